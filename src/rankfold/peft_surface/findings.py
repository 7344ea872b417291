"""What the surface says of a model once, and counts in it, and a config as it is read for it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from rankfold.errors import RankfoldWarning
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.files.adapter_reader import AdapterSource
from rankfold.lora.layers.packed import numbers_not_shown
from rankfold.lora.layers.registry import base_modules

PREFIX_OF_TENSORS = "lora_"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters of ``model`` are trained, and how many there are in all, tied ones counted once."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters) + numbers_not_shown(model)
    return sum(p.numel() for p in parameters if p.requires_grad), total


def buffer_versions(model: nn.Module) -> dict[str, int]:
    """How often each buffer of the base that a state dict holds was written to; running statistics apart,
    of which is told before."""
    return {
        f"{path}.{name}": buffer._version
        for path, module in base_modules(model)
        if not getattr(module, "track_running_stats", False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set and not buffer.is_inference()
    }


def warn_of_changed_buffers(before: Mapping[str, int], model: nn.Module) -> None:
    """Warn of buffers that were written to since ``before``, which no adapter's file holds."""
    now = buffer_versions(model)
    changed = [name for name, version in now.items() if version > before.get(name, version)]
    if changed:
        warnings.warn(
            f"{len(changed)} buffers of the base have changed since the adapter was put on it "
            f"({', '.join(changed[:3])}), and are no part of what is saved: on the base as it was the "
            "adapter will compute something else; name their modules in modules_to_save to save them with it",
            RankfoldWarning,
            stacklevel=4,
        )


def read_config(source: AdapterSource, is_trainable: bool) -> LoraConfig:
    """The config of an adapter folder.  Raises AdapterError."""
    config = LoraConfig.from_pretrained(source.folder)
    config.inference_mode = not is_trainable
    return config


def warn_of_name(name: str) -> None:
    if name and name in PREFIX_OF_TENSORS:
        warnings.warn(
            f"Adapter name '{name}' should not be contained in the prefix '{PREFIX_OF_TENSORS}'. This may "
            "lead to reinitialization of the adapter weights during loading: PEFT does not read such a file",
            RankfoldWarning,
            stacklevel=4,
        )


def warn_of_starts_together(configs: Collection[LoraConfig]) -> None:
    """Warn of a start that changes the base weights beside other adapters."""
    starts = [str(config.init_lora_weights) for config in configs]
    for start, shown in (("pissa", "PiSSA"), ("corda", "CorDA"), ("olora", "OLoRA")):
        if len(starts) > 1 and start in starts:
            warnings.warn(
                f"{shown} changes the base weights of the model and should thus not be used with other "
                f"adapters. Consider converting the {shown} adapter into a normal LoRA adapter "
                "(save_pretrained with path_initial_model_for_weight_conversion).",
                stacklevel=5,
            )
            return


def ties_ended(model: nn.Module) -> bool:
    """Whether a transformers model's input and output embeddings are two weights, and its config says one."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    try:
        layers = [getattr(model, f"get_{side}_embeddings")() for side in ("input", "output")]
    except (NotImplementedError, AttributeError):
        return False
    first, second = (getattr(layer, "weight", None) for layer in layers)
    return first is not None and second is not None and first is not second


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a model as a dictionary."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(config) if isinstance(config, dict) else {"model_type": "custom"}
