"""Another adapter's values in the place of one that is on a model, without a change that a compiler sees."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.compat import is_compiled
from rankfold.errors import AdapterError, ConfigError, MergeError, RankfoldWarning
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.variant_configs import VARIANTS
from rankfold.lora.files.checkpoint import file_tensors
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.placing.targets import alpha_of, rank_of
from rankfold.peft_surface.functional import load_peft_weights, tuner_of, unwrapped

# A compiled model has these built in.
ALIKE = ("peft_type", "use_rslora", "lora_dropout", "use_dora", *VARIANTS)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **options: Any,
) -> None:
    """Give the adapter ``adapter_name`` the values of the one in a folder or a repository of the hub,
    which may target fewer layers and have other ranks and scales.

    Raises ConfigError where the two differ in more, AdapterError for tensors without a place, MergeError
    while the adapter is merged."""
    config = LoraConfig.from_pretrained(model_name_or_path, **options)
    known = tuner_of(unwrapped(model)).peft_config[adapter_name]
    wrong = [
        f"{key}={getattr(config, key)!r}" for key in ALIKE if getattr(config, key) != getattr(known, key)
    ]
    if wrong:
        raise ConfigError(f"Incompatible configs: hot swapping cannot change {', '.join(wrong)}")
    tensors = load_peft_weights(model_name_or_path, torch_device, **options)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """``hotswap_adapter`` with tensors by the keys of PEFT's file."""
    tuner = tuner_of(unwrapped(model))
    layers = {
        path: layer
        for path, layer in adapter_layers(tuner.model)
        if isinstance(layer, LoraLayer) and adapter_name in layer.r
    }
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise MergeError(f"{adapter_name!r} is merged, so that a swap would have no effect; unmerge it first")
    places = file_tensors(tuner.model, adapter_name)
    given = {f"{PREFIX}{key.removeprefix(PREFIX)}": tensor for key, tensor in state_dict.items()}
    if extra := [_in_model(key, adapter_name) for key in given if key not in places]:
        raise AdapterError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(extra)}."
        )
    compiled = is_compiled(model)
    groups = {
        id(factor): groups
        for layer in layers.values()
        if (groups := getattr(layer, "groups", 1)) > 1
        for factor in layer.factors(adapter_name)[:1]
    }
    for key, place in places.items():
        value = given.get(key)
        if value is not None and id(place) in groups:  # a group's rows of A stay its rows
            count = max(value.shape[0], place.shape[0]) // groups[id(place)]
            value = torch.cat([_filled(part, count) for part in value.chunk(groups[id(place)])])
        _put(place, value, key, compiled=compiled)
    for path, layer in layers.items():
        scale = config.scale(rank_of(path, config), alpha_of(path, config))
        held: Any = layer.scaling[adapter_name]
        if isinstance(held, Tensor):
            held.fill_(scale)
        else:
            layer.scaling[adapter_name] = scale


def _put(place: nn.Parameter, value: Tensor | None, key: str, *, compiled: bool) -> None:
    """Put ``value``, of another rank perhaps, into ``place``; what it has no values for is zero."""
    if value is None:
        place.zero_()
    elif place.shape == value.shape:
        place.copy_(value)
    elif all(new <= old for new, old in zip(value.shape, place.shape, strict=True)):
        place.zero_()
        place[tuple(slice(0, size) for size in value.shape)] = value.to(place)
    elif compiled:
        raise AdapterError(
            f"{key}: {tuple(value.shape)} does not fit into {tuple(place.shape)} of a compiled model; call "
            "prepare_model_for_compiled_hotswap with the largest rank before compiling"
        )
    else:
        place.data = value.to(place)


def _in_model(key: str, name: str) -> str:
    stem, _, last = key.rpartition(".")
    return f"{stem}.{name}.{last}" if last in ("weight", "bias") else f"{key}.{name}"


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make every scale a tensor and fill all factors up with zeros to ``target_rank``, so that adapters of
    other scales and ranks can be swapped in after compiling.  ``config``, if given, gets the new ranks.

    Raises ConfigError for a model that is compiled already (unless ``check_compiled`` is "warn" or "ignore"),
    that carries no adapter, or has a larger rank."""
    if is_compiled(model):
        _tell_compiled(check_compiled)
    layers = [
        layer for _, layer in adapter_layers(tuner_of(unwrapped(model)).model) if isinstance(layer, LoraLayer)
    ]
    if not layers:
        raise ConfigError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` "
            "after the adapter has been loaded"
        )
    for layer in layers:
        for name in layer.r:
            like = layer.factors(name)[0]
            layer.scaling[name] = torch.tensor(layer.scaling[name], device=like.device)  # type: ignore[assignment]
            if target_rank is not None:
                _pad(layer, name, target_rank)
        layer.refresh()
    if config is not None and target_rank is not None:
        for each in [config] if isinstance(config, LoraConfig) else config.values():
            each.r, each.rank_pattern = target_rank, dict.fromkeys(each.rank_pattern, target_rank)


def _tell_compiled(check: str) -> None:
    text = "prepare_model_for_compiled_hotswap was called with a model that is already compiled."
    if check == "error":
        raise ConfigError(f"{text} Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check == "warn":
        warnings.warn(f"{text} This will likely result in re-compilation", RankfoldWarning, stacklevel=4)
    elif check != "ignore":
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check}' instead."
        )


def _pad(layer: LoraLayer, name: str, rank: int) -> None:
    """Fill the factors of one adapter up with zeros."""
    groups = int(getattr(layer, "groups", 1))
    if layer.r[name] > rank:
        raise ConfigError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger "
            f"({layer.r[name]})"
        )
    if rank % groups:
        raise ConfigError(
            f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank {rank}, but the target "
            f"rank is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
        )
    lora_a, lora_b = layer.factors(name)
    wide_a = lora_a.new_zeros(rank, *lora_a.shape[1:])
    wide_a[: lora_a.shape[0]] = lora_a
    wide_b = lora_b.new_zeros(lora_b.shape[0], rank // groups, *lora_b.shape[2:])
    if groups == 1:
        wide_b[:, : lora_b.shape[1]] = lora_b
    else:  # a group's part of A moves, so A is filled up group by group
        wide_a = torch.cat([_filled(part, rank // groups) for part in lora_a.chunk(groups)])
        wide_b[:, : lora_b.shape[1]] = lora_b
    lora_a.data, lora_b.data = wide_a, wide_b


def _filled(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])
