"""Attention of rows that stand one after another in one block, each row by itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.compat import looked_into
from rankfold.kernels.causal_attention import LONGEST, causal_attention


@dataclass(frozen=True)
class Rows:
    """How many tokens each row of a block has, and its mask (length, length), None if that is causal."""

    lengths: list[int]
    masks: list[Tensor | None]


def rows_of(mask: Tensor) -> Rows:
    """The rows of a block by its attention mask (tokens, tokens), True where a token sees another: the
    shortest stretches between which nothing is seen."""
    tokens = mask.shape[0]
    places = torch.arange(tokens, device=mask.device)
    seen = mask.to(torch.uint8)
    first = torch.minimum(seen.argmax(dim=1), places)
    last = torch.maximum(tokens - 1 - seen.flip(1).argmax(dim=1), places)
    earliest_after = first.flip(0).cummin(0).values.flip(0)
    latest_before = last.cummax(0).values
    begins = earliest_after == places
    begins[1:] &= latest_before[:-1] < places[1:]
    edges = [*begins.nonzero().squeeze(1).tolist(), tokens]
    stretches = list(pairwise(edges))
    return Rows(
        [end - start for start, end in stretches],
        [_unless_causal(mask[start:end, start:end]) for start, end in stretches],
    )


def _unless_causal(mask: Tensor) -> Tensor | None:
    """A copy of ``mask``, which would keep the whole one alive, or None."""
    return None if torch.equal(mask, torch.ones_like(mask).tril()) else mask.clone()


def attention_of_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention within each row: no product and no memory for what a mask would hide.

    Shapes: query (1, heads, tokens, width), key and value (1, groups, tokens, width), heads a multiple of
    groups -> (1, tokens, heads, width)."""
    if not dropout and _as_products(query, key, value, rows):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return causal_attention(query[0], key[0], value[0], rows.lengths, scale).transpose(0, 1).unsqueeze(0)
    parts = (tensor[0].split(rows.lengths, dim=1) for tensor in (query, key, value))
    found = [
        _attention_of_row(q, k, v, mask, scale, dropout)
        for q, k, v, mask in zip(*parts, rows.masks, strict=True)
    ]
    return torch.cat(found).flatten(1, 2).unsqueeze(0)


def _attention_of_row(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """torch's attention of one row, causal without a ``mask``: query (heads, tokens, width), key and value
    (groups, tokens, width) -> (tokens, groups, heads of a group, width)."""
    query = query.reshape(key.shape[0], -1, *query.shape[1:])
    # Views: with enable_gqa torch would make copies of key and value, and autograd would keep them.
    key, value = (tensor.unsqueeze(1).expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale
    )
    return found.permute(2, 0, 1, 3)


def _as_products(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and max(rows.lengths) <= LONGEST
        and all(mask is None for mask in rows.masks)
        and query.shape[3] == value.shape[3]
        and not looked_into()
    )
