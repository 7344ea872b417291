"""Activated LoRA: the update counts from the invocation on, so that what the base made of the tokens before
it can be used again.  Greenewald et al. 2025, arXiv 2504.12397."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfold.compat import after_backward, in_backward
from rankfold.kernels.low_rank import low_rank_update
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.variants.variant import Variant

# Under this name an activated layer knows, for each row of the batch, how many of its last tokens count.
OFFSETS = "alora_offsets"


def _start(layer: Any, spec: AdapterSpec) -> None:
    layer.__dict__.setdefault(OFFSETS, None)


def _update(layer: Any, name: str, x: Tensor, out: Tensor) -> Tensor:
    """``out`` (rows, tokens, out) or (rows, out), with the update of the tokens that count only."""
    if in_backward():  # recomputed activations, for the last time
        after_backward(lambda: layer.__dict__.update({OFFSETS: None}))
    offsets, tokens = layer.__dict__[OFFSETS], out.shape[1] if out.dim() > 2 else 1  # noqa: PLR2004
    counted = [0 if each is None else min(int(each), tokens) for each in offsets or [None] * len(out)]
    first = tokens - torch.tensor(counted, device=out.device)
    counts = torch.arange(tokens, device=out.device) >= first[:, None]
    chosen = layer.dropped(name, x.reshape(-1, x.shape[-1])[counts.flatten()])
    lora_a, lora_b = layer.factors(name)
    update = low_rank_update(chosen, lora_a, lora_b, layer.scaling[name]).to(out.dtype)
    place = counts.flatten().nonzero().flatten()
    return out.flatten(0, -2).index_add(0, place, update).view(out.shape)


ACTIVATED = Variant(
    _start,
    update=_update,
    cannot_merge="aLoRA does not support merging: it counts for the tokens after its invocation only",
)
