"""What the forward of an adapted model keeps for its backward, counted on the meta device.

The model's own code runs, on tensors that have shapes and no numbers, so nothing is assumed of its
architecture; a wide model takes as little time as a narrow one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rankfold.compat import attention_of, fused_cpu_attention, storage_place
from rankfold.train.planning.recomputing import can_recompute, recompute_activations

NAME = "rankfold_counted"
TYPICAL_NUMBERS = 18  # kept for each token, layer and feature of a Llama, where a model cannot be counted


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward keeps: ``all``, or with each layer computed again in the backward
    ``recomputed`` (which is then joined by those of one layer).  ``guess`` says why they are not counted."""

    all: int
    recomputed: int
    guess: str = ""


@dataclass(frozen=True)
class Shape:
    """A micro-batch: ``rows`` of ``length`` tokens, with ``pixels`` (on the meta device) if it has images."""

    rows: int
    length: int
    pixels: Tensor | None = None


def kept_by_forward(model: Any, shape: Shape, dtypes: Collection[torch.dtype]) -> dict[torch.dtype, Kept]:
    """What a forward of ``shape`` through ``model``, a PeftModel on the meta device, keeps in each of
    ``dtypes``.  Tower and projector count where something of them is trained.  The model is used up."""
    try:
        _ask_for_no_numbers(model.get_base_model())
        everything = _in_each(model, shape, dtypes)
        if not can_recompute(model):
            return {dtype: Kept(size, size) for dtype, size in everything.items()}
        recompute_activations(model)
        little = _in_each(model, shape, dtypes)
    except Exception as error:  # a model may ask for the numbers that its tensors lack
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        return {dtype: _typical(model, shape, dtype, reason) for dtype in dtypes}
    layers = model.config.get_text_config().num_hidden_layers
    return {dtype: Kept(everything[dtype], little[dtype] + everything[dtype] // layers) for dtype in dtypes}


def _typical(model: Any, shape: Shape, dtype: torch.dtype, reason: str) -> Kept:
    text = model.config.get_text_config()
    inputs = shape.rows * shape.length * text.hidden_size * dtype.itemsize
    layer = TYPICAL_NUMBERS * inputs
    return Kept(text.num_hidden_layers * layer, layer + text.num_hidden_layers * inputs, reason)


def _in_each(model: Any, shape: Shape, dtypes: Collection[torch.dtype]) -> dict[torch.dtype, int]:
    found = {}
    for dtype in dtypes:
        model.to(dtype).train()
        found[dtype] = _kept_bytes(model.get_base_model(), partial(_forward, shape=shape, dtype=dtype))
    return found


def _forward(base: Any, shape: Shape, dtype: torch.dtype) -> None:
    if shape.pixels is not None and _sees_trained(base):
        base.get_image_features(shape.pixels.to(dtype))
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long, device="meta")
    base.get_decoder()(input_ids=ids, use_cache=False)


def _kept_bytes(model: Any, forward: Callable[[Any], None]) -> int:
    known = {storage_place(tensor) for tensor in chain(model.parameters(), model.buffers())}
    held: dict[int, Tensor] = {}  # so that no place is given out twice

    def count(tensor: Tensor) -> Tensor:
        held.setdefault(storage_place(tensor), tensor)
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        forward(model)
    return sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in known)


def _sees_trained(base: Any) -> bool:
    language = {id(parameter) for parameter in base.get_decoder().parameters()}
    return any(p.requires_grad and id(p) not in language for p in base.parameters())


def _ask_for_no_numbers(base: Any) -> None:
    """Let attention keep what torch's fused kernels keep, not the products of all pairs, and positions turn
    by the usual angles: others are chosen by looking at the positions."""
    from transformers import AttentionInterface

    for module in base.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"
    if attention_of(base.config) == "sdpa":
        AttentionInterface.register(NAME, _attention)
        base.set_attn_implementation(NAME)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    out = fused_cpu_attention(query, key, value, options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None
