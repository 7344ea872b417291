"""Turning adapters up and down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rankfold.errors import ConfigError
from rankfold.lora.layers.factors import LoraLayer


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block every low-rank update counts ``multiplier`` times (wise-ft for values from 0 to 1,
    Wortsman et al. 2022, arXiv 2109.01903).

    Raises ConfigError for a multiplier that is no finite number, a model without LoRA layers, or one that
    is merged, where the block would do nothing."""
    if (
        isinstance(multiplier, bool)
        or not isinstance(multiplier, (int, float))
        or not math.isfinite(multiplier)
    ):
        raise ConfigError(f"multiplier must be a finite number, got {multiplier!r}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ConfigError("this model has no LoRA layer whose scale could be changed")
    if any(layer.merged for layer in layers):
        raise ConfigError("the adapters are merged, so their scale has no effect; unmerge_adapter() first")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update({name: scale * multiplier for name, scale in scales.items()})
        yield
    finally:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update(scales)
