"""A model whose linear layers are fast with few rows, for as long as it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.files import cache_folder
from rankfold.kernels.few_rows import few_rows, linear
from rankfold.lora.layers.linear import FUSED_CLASSES
from rankfold.models.base.memory import free_memory_bytes
from rankfold.storage.layers import HeldLinear, expanded_meanwhile, held_layers

EXPANDED_SHARE = 0.5  # of the free memory, for the numbers of weights that are held in few bytes


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Within the block plain linear layers, and those with an adapter, compute few rows as ``few_rows`` does,
    and what is held in few bytes is there as numbers, if there is memory for them."""
    with ExitStack() as stack:
        stack.enter_context(_expanded(model))
        stack.enter_context(_few_rows(model))
        yield


@contextmanager
def _few_rows(model: nn.Module) -> Iterator[None]:
    weights: list[Any]
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    adapted: list[Any] = [m for m in model.modules() if type(m) in FUSED_CLASSES]
    held = [m.wide for m in model.modules() if isinstance(m, HeldLinear) and "wide" in vars(m)]
    weights = [*held, *(m.weight for m in layers + adapted if type(m.weight) is nn.Parameter)]
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


@contextmanager
def _expanded(model: nn.Module) -> Iterator[None]:
    layers = [layer for layer in held_layers(model).values() if isinstance(layer, HeldLinear)]
    needed = sum(
        rows * columns * torch.float32.itemsize for rows, columns in (layer.shape for layer in layers)
    )
    fits = layers and needed <= EXPANDED_SHARE * free_memory_bytes(layers[0].held.device)
    with expanded_meanwhile(layers if fits else []):
        yield


def _forward(layer: Any, x: Tensor) -> Tensor:
    own = layer._parameters
    return linear(x, own["weight"], own["bias"])
