"""Causal attention of one short row by plain matrix products, for CPUs that multiply in half precision.

torch's own kernel for CPUs makes its half-precision products in tiles so small that they run slower than its
float32 ones; as whole products a row of a few hundred tokens takes half the time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.compat import softmax_gradient

BLOCK = 96  # queries at a time, and only the keys up to the last of them: what is hidden is mostly not made
LONGEST = 1024  # tokens; for longer rows torch's kernel is the faster one


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` over each query's own and all earlier keys.

    Shapes: query (heads, tokens, width), key and value (groups, tokens, width), heads a multiple of groups
    -> (heads, tokens, width).  Keeps its inputs only; the backward makes the weights anew, a block of
    queries at a time.  Scores, and the sums for key and value, are made in float32.
    Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; groups: Ainslie et al. 2023 (arXiv 2305.13245)."""
    return cast(Tensor, _CausalAttention.apply(query, key, value, scale))  # type: ignore[no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, ctx.scale = inputs
        ctx.save_for_backward(query, key, value)
        out = torch.empty_like(query)
        for place in _blocks(query.shape[1]):
            weights = _weights(query, key, place, ctx.scale)
            out[:, place] = _by_head(torch.bmm(weights, value[:, : place.stop]), query, place)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        at_least = torch.promote_types(key.dtype, torch.float32)
        by_query = torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(t, dtype=at_least) for t in (key, value))
        for place in _blocks(query.shape[1]):
            seen = slice(place.stop)
            weights = _weights(query, key, place, ctx.scale)
            arrived = _by_group(grad[:, place], key)
            by_value[:, seen] += torch.bmm(weights.transpose(1, 2), arrived)
            by_weights = torch.bmm(arrived, value[:, seen].transpose(1, 2))
            by_scores = softmax_gradient(by_weights, weights)
            by_scores *= ctx.scale
            by_query[:, place] = _by_head(torch.bmm(by_scores, key[:, seen]), query, place)
            by_key[:, seen] += torch.bmm(by_scores.transpose(1, 2), _by_group(query[:, place], key))
        return by_query, by_key.to(key.dtype), by_value.to(value.dtype), None


def _blocks(tokens: int) -> Iterator[slice]:
    """As few blocks as it takes, of like length."""
    count = -(-tokens // BLOCK)
    edges = [tokens * i // count for i in range(count + 1)] if count else []
    return (slice(*edge) for edge in pairwise(edges))


def _weights(query: Tensor, key: Tensor, place: slice, scale: float) -> Tensor:
    """What each query of ``place`` makes of the keys up to its end (groups, heads / groups * block, keys)."""
    of_block = query[:, place]
    heads, block, _ = of_block.shape
    at_least = torch.promote_types(key.dtype, torch.float32)
    grouped, seen = _by_group(of_block, key).to(at_least), key[:, : place.stop].to(at_least)
    scores = torch.bmm(grouped, seen.transpose(1, 2)).mul_(scale)
    later = torch.ones(block, block, dtype=torch.bool, device=key.device).triu_(1)
    scores.view(heads, block, -1)[:, :, place.start :].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, -1).to(key.dtype)


def _by_group(of_heads: Tensor, key: Tensor) -> Tensor:
    """(heads, block, width) -> (groups, heads / groups * block, width)."""
    return of_heads.reshape(key.shape[0], -1, key.shape[2])


def _by_head(of_groups: Tensor, query: Tensor, place: slice) -> Tensor:
    return of_groups.view(query.shape[0], place.stop - place.start, -1)
