"""A model whose linear layers are fast with few rows, for as long as it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.files import cache_folder
from rankfold.kernels.few_rows import few_rows, in_bfloat16, linear
from rankfold.lora.layers.linear import FUSED_CLASSES
from rankfold.models.base.memory import free_memory_bytes
from rankfold.storage.forms import BF16
from rankfold.storage.layers import HeldLinear, expanded_meanwhile, held_layers

EXPANDED_SHARE = 0.5  # of the free memory, for numbers of weights that are there in another form too


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Within the block plain linear layers, and those with an adapter, compute few rows as ``few_rows`` does,
    what is held in few bytes is there as numbers, and what bfloat16 can hold is read in it, if there is
    memory for them."""
    with ExitStack() as stack:
        stack.enter_context(_expanded(model))
        stack.enter_context(_few_rows(model))
        yield


@contextmanager
def _few_rows(model: nn.Module) -> Iterator[None]:
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    adapted: list[Any] = [m for m in model.modules() if type(m) in FUSED_CLASSES]
    held: list[Any] = [m for m in model.modules() if isinstance(m, HeldLinear) and "wide" in vars(m)]
    plain = [m.weight for m in layers + adapted if type(m.weight) is nn.Parameter]
    weights = [*(layer.wide for layer in held), *plain]
    on_cpu = weights and all(weight.device.type == "cpu" for weight in weights)
    if not on_cpu or torch.compiler.is_compiling():
        yield
        return

    def narrow() -> dict[int, Tensor]:
        stored = {id(m.wide): m.held.detach().view(torch.bfloat16) for m in held if m.form is BF16}
        return stored | _narrow(plain)

    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        with few_rows(weights, cache_folder() / "numba", narrow):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _narrow(weights: Sequence[Tensor]) -> dict[int, Tensor]:
    """By the id of a weight, its numbers in bfloat16, as most models come: none of them is rounded."""
    found: dict[int, Tensor] = {}
    room = EXPANDED_SHARE * free_memory_bytes(weights[0].device) if weights else 0
    for weight in {id(weight): weight for weight in weights if weight.dtype == torch.float32}.values():
        size = weight.numel() * torch.bfloat16.itemsize
        if size <= room and (narrow := in_bfloat16(weight.detach())) is not None:
            found[id(weight)] = narrow
            room -= size
    return found


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
