"""How far an adapter moves the weights of its base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from rankfold.errors import MergeError
from rankfold.lora.layers.factors import LoraLayer

NUMBERS = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The layers of one kind, such as all ``self_attn.q_proj``: how many, and the norm of their update beside
    that of their weight (Frobenius), on average and in the layer that moved most."""

    kind: str
    layers: int
    mean: float
    most: float
    most_in: str


@torch.no_grad()
def moved(model: Any) -> list[Moved]:
    """By kind of layer, those that moved most first.  Layers whose update is no change of their weight are
    left out."""
    found: dict[str, dict[str, float]] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            share = _share(layer)
            if share is not None:
                found.setdefault(_kind(name), {})[name] = share
    by_kind = [
        Moved(
            kind=kind,
            layers=len(shares),
            mean=fmean(shares.values()),
            most=max(shares.values()),
            most_in=max(shares, key=lambda name: shares[name]),
        )
        for kind, shares in found.items()
    ]
    return sorted(by_kind, key=lambda each: -each.mean)


def _share(layer: Any) -> float | None:
    """The norm of the layer's updates, all together, beside that of its weight."""
    try:
        deltas = [layer.delta(name) for name in layer.applied]
    except (MergeError, NotImplementedError):
        return None
    weight = layer.base_weight().float().norm()
    if not deltas:
        return 0.0
    return float(torch.stack(deltas).sum(0).norm() / weight.clamp(min=torch.finfo(torch.float32).tiny))


def _kind(name: str) -> str:
    """What stands behind the last number of a layer's name."""
    last = None
    for last in NUMBERS.finditer(name):  # noqa: B007 - the last one is used
        pass
    return name[last.end() + 1 :] if last is not None and last.end() < len(name) else name
