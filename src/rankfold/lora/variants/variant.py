"""What a variant of LoRA does otherwise than the plain pair: all that a layer looks up of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankfold.kernels.low_rank import add_low_rank_update
from rankfold.lora.layers.base import AdapterSpec

HeldTensors = dict[str, Any]
Pair = tuple[Tensor, Tensor]


def _no_problems(layer: nn.Module, spec: AdapterSpec) -> list[str]:
    return []


def _no_tensors(layer: Any, name: str) -> HeldTensors:
    return {}


@dataclass(frozen=True)
class Variant:
    """Functions of a layer, adapted by then, and the name of an adapter.

    ``start`` makes what is kept beside the factors.  ``pair``: the A (rank, in) and B (out, rank) whose
    product is the update, if not the factors themselves.  ``update``: the output with the update, for an
    input before its dropout, where that is no product of ``pair``.  ``tensors``: what is kept, by its key in
    PEFT's file.  ``problems``: why a layer cannot carry it.  ``cannot_merge``: why it is no change of the
    weight."""

    start: Callable[[Any, AdapterSpec], None]
    pair: Callable[[Any, str], Pair] | None = None
    update: Callable[[Any, str, Tensor, Tensor], Tensor] | None = None
    tensors: Callable[[Any, str], HeldTensors] = _no_tensors
    problems: Callable[[nn.Module, AdapterSpec], list[str]] = _no_problems
    cannot_merge: str = ""


def plain_update(layer: Any, name: str, x: Tensor, out: Tensor, pair: Pair) -> Tensor:
    """``out`` with the update that ``pair`` makes of ``x`` after the adapter's dropout."""
    return add_low_rank_update(out, layer.dropped(name, x), *pair, layer.scaling[name])
