"""Rows attended to one by one against one masked attention over the block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankfold.kernels.rows_apart import attention_of_rows, rows_of


def packed(lengths, window=None):
    row = torch.repeat_interleave(torch.tensor(lengths))
    mask = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    window=st.sampled_from([None, 2, 5]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.2]),
)
def test_every_row_is_attended_to_as_under_its_mask(lengths, window, heads, scale):
    torch.manual_seed(0)
    tokens, mask = sum(lengths), packed(lengths, window)
    query, key, value = (
        torch.randn(1, n, tokens, 8, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], *[heads[1]] * 2)
    )
    rows = rows_of(mask)
    assert rows.lengths == lengths
    assert [m is None for m in rows.masks] == [window is None or length <= window for length in lengths]
    found = attention_of_rows(query, key, value, rows, scale)
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for got, expected in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(wanted, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[0], [1, 2, 3, 4]], [[0, 1, 2, 3, 4]]])
def test_rows_that_see_themselves_both_ways_keep_their_mask(rows):
    """A prefix that is not causal, as of images: no row is taken for causal that is not."""
    mask = torch.zeros(5, 5, dtype=torch.bool)
    for row in rows:
        mask[row[0] : row[-1] + 1, row[0] : row[-1] + 1] = True
    found = rows_of(mask)
    assert found.lengths == [len(row) for row in rows]
    for row, block in zip(rows, found.masks, strict=True):
        assert block is None if len(row) == 1 else block.all()


@pytest.mark.parametrize("crossing", [(0, 4), (4, 0), (2, 3), (3, 2)])
def test_one_pair_seen_across_the_border_joins_the_rows(crossing):
    mask = packed([3, 2])
    mask[crossing] = True
    assert rows_of(mask).lengths == [5]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 7), st.data())
def test_nothing_is_seen_between_the_rows_of_any_mask(tokens, data):
    bits = data.draw(st.lists(st.booleans(), min_size=tokens**2, max_size=tokens**2))
    mask = torch.tensor(bits).view(tokens, tokens)
    start = 0
    for length, block in zip(rows_of(mask).lengths, rows_of(mask).masks, strict=True):
        end = start + length
        own = mask[start:end, start:end]
        assert torch.equal(own, own.new_ones(own.shape).tril() if block is None else block)
        if mask.any(dim=1).all():
            assert not mask[start:end, :start].any()
            assert not mask[start:end, end:].any()
        start = end
    assert start == tokens


def test_keys_and_values_shared_by_heads_are_kept_once():
    query, key, value = (torch.randn(1, n, 50, 8, requires_grad=True) for n in (6, 2, 2))
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        attention_of_rows(query, key, value, rows_of(packed([20, 30])))
    given = sum(t.untyped_storage().nbytes() for t in (query, key, value))
    outputs, sums = query.nbytes, 6 * 50 * 4
    assert sum(kept.values()) == given + outputs + sums
