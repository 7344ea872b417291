"""Working out, before anything is changed, what a new adapter will be on this model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.errors import ConfigError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.base import adapter_layers, base_modules
from rankfold.lora.layers.init import refuse_start_from_data
from rankfold.lora.layers.saved import with_task_modules
from rankfold.lora.placing.inject import check_ranks, check_targets
from rankfold.lora.placing.non_lora_params import find_extras
from rankfold.lora.placing.parameter_targets import checked_parameters, owners_of
from rankfold.lora.placing.targets import ALL_LINEAR, find_targets, module_names, resolve, shortest_list
from rankfold.lora.placing.ties import find_heads, spelt_with_leaders, with_leaders


def read_config(folder: str | Path, is_trainable: bool) -> LoraConfig:
    """The config of an adapter folder.  Raises AdapterError."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    return config


def prepared(model: nn.Module, given: LoraConfig) -> tuple[list[str], LoraConfig]:
    """The targets of a new adapter and the model's own copy of its config, all of it checked."""
    refuse_start_from_data(given)
    given = with_task_modules(given)
    targets, modules = find_targets(model, given), dict(base_modules(model))
    heads = find_heads(model, targets, given)
    targets = with_leaders(targets, heads)
    layers = {target: modules[target] for target in targets}
    check_targets(layers)
    check_ranks(layers, given)
    parameters = checked_parameters(model, targets, given, new=True)
    find_extras(model, [*targets, *owners_of(parameters)], given, {}, every_entry=True)
    config = dataclasses.replace(given, **_spelt_out(model, targets, given))
    if heads and config.target_modules:
        config.target_modules = spelt_with_leaders(config.target_modules, heads)
    config.fan_in_fan_out = _fan_in_fan_out(layers.values(), given)
    base_name = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "name_or_path", None
    )
    config.base_model_name_or_path = config.base_model_name_or_path or base_name or None
    if config.task_type is None:
        kind = type(model)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return targets, config


def _fan_in_fan_out(layers: Iterable[nn.Module], config: LoraConfig) -> bool:
    """True where every linear target is a transformers Conv1D, as PEFT writes it."""
    kinds = {type(layer) for layer in layers}
    linear = {kind for kind in kinds if issubclass(kind, nn.Linear)}
    transposed = {kind for kind in kinds if any(k.__name__ == "Conv1D" for k in kind.__mro__)}
    return not linear if linear or transposed else config.fan_in_fan_out


def _spelt_out(model: nn.Module, targets: list[str], config: LoraConfig) -> dict[str, Any]:
    """``target_modules`` as names where the config left the choice to the model."""
    wanted = config.target_modules
    if wanted is None:
        usual = resolve(model, config)
        return {"target_modules": usual if isinstance(usual, str) else sorted(usual)} if usual else {}
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return {"target_modules": shortest_list(targets, module_names(model)), "exclude_modules": None}
    return {}


def refuse_adapted(model: nn.Module) -> None:
    if any(True for _ in adapter_layers(model)):
        raise ConfigError(
            "this model carries an adapter already; use add_adapter() or load_adapter() on the wrapped "
            "model, or merge_and_unload() or unload() it first"
        )
