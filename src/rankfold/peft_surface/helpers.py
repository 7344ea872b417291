"""Small functions of PEFT's that its users call beside a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankfold.lora.config.lora_config import LoraConfig, PeftType
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.registry import base_modules
from rankfold.lora.placing.targets import ALL_LINEAR, is_left_out, is_target, resolve, shortest_list
from rankfold.peft_surface.tuner import LoraModel

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: LoraModel.prefix}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}


def get_peft_config(config_dict: dict[str, Any]) -> LoraConfig:
    """The config of a dictionary of its options, ``peft_type`` among them.  Raises ConfigError."""
    return LoraConfig.from_peft_type(**config_dict)


class LeftOut:
    """What ``check_target_module_exists`` gives for a module that is left out: false, and told apart."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: LoraConfig, key: str) -> bool | LeftOut:
    """Whether ``config`` means the module of this dotted name, as far as the name tells."""
    if is_left_out(key, config):
        return LeftOut()
    wanted = config.target_modules
    if wanted is None:
        return False
    return is_target(key, wanted if isinstance(wanted, str) else frozenset(wanted), config)


def inspect_matched_modules(tuner: LoraModel, adapter_name: str = "default") -> dict[str, list[str]]:
    """The dotted names of the modules that an adapter's config means, and of those that it does not."""
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in base_modules(tuner.model):
        meant = check_target_module_exists(tuner.peft_config[adapter_name], path)
        found["matched" if meant else "unmatched"].append(path)
    return found


def include_all_linear_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """``config``, changed in place, with the names of all linear layers where it says "all-linear"."""
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        config.target_modules = {*resolve(model, config)}
    return config


def minimal_target_modules(targets: list[str] | set[str], others: list[str] | set[str]) -> set[str]:
    """The fewest endings of ``targets`` that are endings of none of ``others``.  Raises ValueError for empty
    names."""
    if not targets or isinstance(targets, str):
        raise ValueError("target_modules should be a list or set of strings")
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string")
    if shared := sorted({*targets} & {*others}):
        raise ValueError(f"target_modules and other_module_names contain common elements: {shared}")
    return {*shortest_list(sorted(targets), [*others, *targets])}


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen floating-point parameters become ``dtype``, trained ones float32, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def check_if_peft_model(folder: Any) -> bool:
    """Whether a folder or a repository of the hub holds an adapter."""
    try:
        LoraConfig.from_pretrained(folder)
    except ValueError:
        return False
    return True


def infer_device() -> str:
    """The device that torch computes on here."""
    return (
        str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    )


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of a module, the module, and its own name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """PEFT's word; inputs are cast where a product needs it only."""
    yield


def has_adapters(module: nn.Module) -> bool:
    return any(isinstance(each, AdapterLayer) for each in module.modules())
