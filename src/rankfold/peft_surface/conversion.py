"""A base-changing start as a plain LoRA adapter of twice the rank, for the base as it was.

The tuned weight is W - s B0 A0 + s B A, so the change of W is s [B | -B0] [A ; A0] (PEFT's
``subtract_mutated_init``).  A0 and B0 come from the adapter as it was saved before training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rankfold.errors import AdapterError, ConfigError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.files.adapter_reader import AdapterSource, StoredAdapter, read_weights
from rankfold.lora.files.checkpoint import file_tensors, fill_adapter
from rankfold.lora.layers.base import upcast
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import adapter_layers

CLOSE = (
    1e-4  # of the largest weight: what the start's parts may differ by, beside rounding to the base's dtype
)


@torch.no_grad()
def as_plain_adapter(
    model: nn.Module, name: str, config: LoraConfig, initial: Path
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the file's tensors of adapter ``name`` as a plain one; the model is not changed.

    Raises ConfigError if the adapter has no such form, AdapterError if ``initial`` is not the folder of
    the adapter as it started."""
    layers = [(path, layer) for path, layer in adapter_layers(model) if name in layer.adapter_names()]
    split = [(path, layer) for path, layer in layers if isinstance(layer, LoraLayer)]
    check_convertible(name, config, split)
    expected = file_tensors(model, name)
    start = {key: torch.empty_like(parameter) for key, parameter in expected.items()}
    stored = StoredAdapter(
        AdapterSource(initial), LoraConfig.from_pretrained(initial), *read_weights(initial)
    )
    fill_adapter(stored, start)
    keys = {id(parameter): key for key, parameter in expected.items()}
    converted = {key: parameter.detach() for key, parameter in expected.items()}
    foreign = []
    for path, layer in split:
        key_a, key_b = (keys[id(factor)] for factor in layer.factors(name))
        a0, b0 = start[key_a], start[key_b]
        if not is_start_of(layer, name, a0, b0):
            foreign.append(path)
        converted[key_a] = torch.cat([converted[key_a], a0])
        converted[key_b] = torch.cat([converted[key_b], -b0], dim=1)
    if foreign:
        headline = f"{initial} is not the adapter {name!r} as it started; its product is not what left:"
        raise AdapterError(bullet_list(headline, foreign))
    return doubled(config), converted


def check_convertible(name: str, config: LoraConfig, layers: list[tuple[str, LoraLayer]]) -> None:
    """Raise ConfigError if an adapter changed no base weight at its start, or is more than factors."""
    if config.use_dora:
        raise ConfigError(
            f"{name!r} uses DoRA, whose change of the weight has no low rank: it cannot become a plain "
            "adapter; save it without path_initial_model_for_weight_conversion, or merge it"
        )
    wrong = not_plain(config)
    if config.init_lora_weights == "loftq":
        wrong.append("LoftQ rounded the base, which no factors give back")
    if wrong:
        raise ConfigError(f"{name!r} cannot become a plain adapter: {'; '.join(wrong)}")
    whole = [path for path, layer in layers if layer.split is None or name not in layer.split.names]
    if whole:
        headline = (
            f"path_initial_model_for_weight_conversion is for adapters whose start changed the base weights "
            f"(pissa, olora); {name!r} left these as they were:"
        )
        raise ConfigError(bullet_list(headline, whole))


def is_start_of(layer: LoraLayer, name: str, a0: Tensor, b0: Tensor) -> bool:
    """Whether ``s B0 A0`` is what the start of adapter ``name`` took from the base weight."""
    whole, residual = (layer.base_weight_for(names).detach() for names in ([], [name]))
    part = layer.specs[name].scale * (upcast(b0) @ upcast(a0))
    gap = upcast(whole) - upcast(residual) - (part.T if layer.row_dim == 1 else part)
    limit = (CLOSE + 2 * torch.finfo(whole.dtype).eps) * upcast(whole).abs().max()
    return bool(gap.abs().max() <= limit)


def doubled(config: LoraConfig) -> LoraConfig:
    """``config`` for twice the rank at the same scale, every rank and alpha of a pattern included."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern=_times(factor, config.alpha_pattern),
    )


def _times(factor: float, values: Mapping[str, float]) -> dict[str, float]:
    return {key: factor * value for key, value in values.items()}
