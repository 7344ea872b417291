"""A model whose linear layers are fast with few rows, for as long as it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.files import cache_folder
from rankfold.kernels.few_rows import few_rows, linear
from rankfold.lora.layers.linear import FUSED_CLASSES


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Within the block plain linear layers, and those with an adapter, compute few rows as ``few_rows`` does."""
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    adapted: list[Any] = [m for m in model.modules() if type(m) in FUSED_CLASSES]
    weights = [m.weight for m in layers + adapted if type(m.weight) is nn.Parameter]
    on_cpu = weights and all(weight.device.type == "cpu" for weight in weights)
    if not on_cpu or torch.compiler.is_compiling():
        yield
        return
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        with few_rows(weights, cache_folder() / "numba"):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    own = layer._parameters
    return linear(x, own["weight"], own["bias"])
