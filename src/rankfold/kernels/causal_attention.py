"""Causal attention of many short rows by plain matrix products: rows of like length at a time.

torch's own kernel for CPUs makes its half-precision products in tiles so small that they run slower than its
float32 ones, and takes one row after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.kernels.forms import form_of

BLOCK = 128  # queries at a time, and only the keys up to the last of them: what is hidden is mostly not made
LONGEST = 1024  # tokens; for longer rows torch's kernel is the faster one
ALIKE = 0.9  # the share of a group's tokens that are no padding, at least
SCORES = 1 << 24  # of a block of queries at a time: 64 MB of float32


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """``softmax(scale * q k^T) v`` over each query's own and all earlier keys of its row.

    Shapes: query (heads, tokens, width), key and value (groups, tokens, width), heads a multiple of groups,
    rows of ``lengths`` one after another -> (heads, tokens, width).  Keeps its inputs only; the backward
    makes the weights anew, a block of queries at a time.  Scores, and sums over blocks, are in float32.
    Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; groups: Ainslie et al. 2023 (arXiv 2305.13245)."""
    return cast(Tensor, _CausalAttention.apply(query, key, value, lengths, scale))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Layout:
    """How rows that stand one after another become padded ones, groups of like length one after another.

    ``shapes``: rows and tokens of each group; ``there``: for each padded place, row by row, head by head, the
    number of its (token, head); ``back``: the other way round; ``padding``: the places behind the rows' ends,
    where no query of theirs looks."""

    shapes: list[tuple[int, int]]
    there: Tensor
    back: Tensor
    padding: Tensor

    def padded(self, of_heads: Tensor) -> list[Tensor]:
        """(heads, tokens of all rows, width) -> (rows, heads, tokens, width) of each group."""
        heads, _, width = of_heads.shape
        found = of_heads.transpose(0, 1).reshape(-1, width).index_select(0, self.there)
        found.index_fill_(0, self.padding, 0)
        sizes = [rows * heads * tokens for rows, tokens in self.shapes]
        parts = zip(found.split(sizes), self.shapes, strict=True)
        return [part.view(rows, heads, tokens, width) for part, (rows, tokens) in parts]

    def joined(self, padded: Sequence[Tensor], like: Tensor) -> Tensor:
        """The other way round, in the shape of ``like``, tokens first in memory."""
        heads, tokens, width = like.shape
        flat = [each.to(like.dtype).reshape(-1, width) for each in padded] or [like.new_empty(0, width)]
        found = (torch.cat(flat) if len(flat) != 1 else flat[0]).index_select(0, self.back)
        return found.view(tokens, heads, width).transpose(0, 1)


@lru_cache(maxsize=8)  # every layer asks for the same, in the forward and in the backward
def layout_of(lengths: tuple[int, ...], most_heads: int, heads: int) -> Layout:
    """The layout of something of so many ``heads`` beside queries of ``most_heads``."""
    total = sum(lengths)
    there, shapes = [], []
    for group in groups_of(lengths, most_heads):
        tokens = len(group[0])
        padded = [[*row, *[total] * (tokens - len(row))] for row in group]
        shapes.append((len(group), tokens))
        there.append((torch.tensor(padded)[:, None] * heads + torch.arange(heads)[:, None]).flatten())
    places = torch.cat([*there, torch.empty(0, dtype=torch.long)])
    is_padding = places >= total * heads
    back = torch.empty(total * heads, dtype=torch.long)
    back[places[~is_padding]] = (~is_padding).nonzero().squeeze(1)
    return Layout(shapes, places.masked_fill(is_padding, 0), back, is_padding.nonzero().squeeze(1))


def groups_of(lengths: Sequence[int], heads: int) -> list[list[range]]:
    """The rows, longest first, in as few groups as their lengths and the room for their scores allow."""
    rows = (range(*edge) for edge in pairwise(accumulate(lengths, initial=0)))
    groups: list[list[range]] = []
    for row in sorted(filter(len, rows), key=len, reverse=True):
        if groups and _takes(groups[-1], row, heads):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _takes(group: list[range], row: range, heads: int) -> bool:
    rows, tokens = len(group) + 1, len(group[0])
    held = sum(map(len, group)) + len(row)
    return held >= ALIKE * tokens * rows and heads * min(tokens, BLOCK) * tokens * rows <= SCORES


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, lengths, ctx.scale = inputs
        ctx.layouts = [layout_of(tuple(lengths), len(query), len(each)) for each in (query, key, value)]
        ctx.save_for_backward(query, key, value)
        # Autocast would make the scores in half precision.
        with torch.autocast(query.device.type, enabled=False):
            found = [group.attended() for group in _groups(ctx, query, key, value)]
        out: Tensor = ctx.layouts[0].joined(found, query)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = ctx.saved_tensors  # which activation checkpointing makes anew, and gives out once
        arrived = ctx.layouts[0].padded(grad)
        found = [group.gradients(part) for group, part in zip(_groups(ctx, *inputs), arrived, strict=True)]
        joined = (
            layout.joined([each[place] for each in found], inputs[place])
            for place, layout in enumerate(ctx.layouts)
        )
        return *joined, None, None


def _groups(ctx: Any, *inputs: Tensor) -> Iterator[Padded]:
    parts = (layout.padded(tensor) for layout, tensor in zip(ctx.layouts, inputs, strict=True))
    return (Padded(ctx.scale, *group) for group in zip(*parts, strict=True))


class Padded:
    """Rows of one length: query (rows, heads, tokens, width), key and value (rows, groups, tokens, width)."""

    def __init__(self, scale: float, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.scale, self.query, self.key, self.value = scale, query, key, value
        self.form = form_of(query, key, value)
        self.at_least = torch.promote_types(key.dtype, torch.float32)
        self.wide_query, self.wide_key = query.to(self.at_least), key.to(self.at_least)

    def attended(self) -> Tensor:
        found = torch.empty_like(self.query)
        for place in _blocks(self.query.shape[2]):
            found[:, :, place] = _product(self.shares(place), self.value[:, :, : place.stop])
        return found

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_query = torch.empty_like(self.query)
        by_key, by_value = (torch.zeros_like(t, dtype=self.at_least) for t in (self.key, self.value))
        for place in _blocks(self.query.shape[2]):
            shares, arrived, seen = self.shares(place), grad[:, :, place], slice(place.stop)
            by_value[:, :, seen] += _across(shares, arrived, by_value)
            by_shares = _product(arrived, self.value[:, :, seen].transpose(2, 3))
            by_scores = self.form.causal_shares_gradient(by_shares, shares, self.scale)
            by_query[:, :, place] = _product(by_scores, self.key[:, :, seen])
            by_key[:, :, seen] += _across(by_scores, self.query[:, :, place], by_key)
        return by_query, by_key, by_value

    def shares(self, place: slice) -> Tensor:
        """What each query of ``place`` makes of the keys up to its end (rows, heads, block, keys)."""
        seen = self.wide_key[:, :, : place.stop].transpose(2, 3)
        scores = _product(self.wide_query[:, :, place], seen)
        return self.form.causal_shares(scores, self.scale, self.key.dtype)


def _blocks(tokens: int) -> Iterator[slice]:
    """As few blocks as it takes, of like length."""
    count = -(-tokens // BLOCK)
    return (slice(*edge) for edge in pairwise([tokens * i // count for i in range(count + 1)]))


def _product(of_heads: Tensor, of_groups: Tensor) -> Tensor:
    """(rows, heads, m, k) and (rows, groups, k, n) -> (rows, heads, m, n)."""
    rows, heads, m, _ = of_heads.shape
    found = torch.bmm(_by_group(of_heads, of_groups.shape[1]), of_groups.flatten(0, 1))
    return found.view(rows, heads, m, -1)


def _across(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """``left^T right`` summed over the heads of a group: (rows, heads, k, m) and (rows, heads, k, n) ->
    (rows, groups, m, n)."""
    groups = like.shape[1]
    found = torch.bmm(_by_group(left, groups).transpose(1, 2), _by_group(right, groups))
    return found.view(like.shape[0], groups, *found.shape[1:])


def _by_group(of_heads: Tensor, groups: int) -> Tensor:
    """(rows, heads, m, n) -> (rows * groups, heads of a group * m, n)."""
    rows, _, _, width = of_heads.shape
    return of_heads.reshape(rows * groups, -1, width)
