"""How fresh factors start: the values of ``init_lora_weights``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError

if TYPE_CHECKING:
    from rankfold.lora.factors import LoraLayer
    from rankfold.lora.layers import AdapterSpec


def start_factors(layer: LoraLayer, spec: AdapterSpec) -> None:
    """Give the factors of ``spec.name`` the start that its config asks for.

    Every start but False leaves the layer's output as it was."""
    start = spec.config.init_lora_weights
    if start is False:
        return
    lora_a, lora_b = layer.factors(spec.name)
    if start is True:
        kaiming(lora_a)
    elif start == "gaussian":
        nn.init.normal_(lora_a, std=1 / spec.rank)
    else:
        raise ConfigError(f"init_lora_weights={start!r} is not known to a {layer.plain_class.__name__}")
    nn.init.zeros_(lora_b)
    bias = getattr(layer.lora_B[spec.name], "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)


def kaiming(lora_a: Tensor) -> None:
    """PEFT's default: ``kaiming_uniform_`` with a = sqrt(5)."""
    with torch.no_grad():
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
