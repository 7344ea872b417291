"""Attention by whole products against torch's own, in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankfold.kernels import causal_attention as module
from rankfold.kernels import forms
from rankfold.kernels.causal_attention import causal_attention, groups_of
from rankfold.kernels.rows_apart import Rows, attention_of_rows

HEADS = [(1, 1), (4, 2), (6, 2), (3, 1)]


def inputs(tokens, heads=(6, 2), width=8, dtype=torch.float64):
    torch.manual_seed(tokens)
    # As a model lays them out: tokens first, heads beside each other.
    return [
        torch.randn(tokens, n, width, dtype=dtype).transpose(0, 1).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]


def by_torch(query, key, value, lengths, scale):
    """Row by row."""
    rows = zip(*(tensor[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True) for row in rows],
        dim=2,
    )[0]


def results(attend, tensors, lengths, scale, upstream):
    found = attend(*tensors, lengths, scale)
    return found, *torch.autograd.grad(found, tensors, upstream)


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    heads=st.sampled_from(HEADS),
    scale=st.sampled_from([0.3, 1.0, 5.0]),
    block=st.sampled_from([1, 3, 7, 64]),
    alike=st.sampled_from([0.1, 0.9, 1.0]),
)
def test_values_and_gradients_are_those_of_torch(lengths, heads, scale, block, alike):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "ALIKE", alike)
        module.layout_of.cache_clear()
        tensors = inputs(sum(lengths), heads)
        upstream = torch.randn_like(tensors[0])
        pairs = (
            results(attend, tensors, lengths, scale, upstream) for attend in (causal_attention, by_torch)
        )
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_gradient_is_that_of_small_differences(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    monkeypatch.setattr(module, "ALIKE", 0.5)
    module.layout_of.cache_clear()
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, [4, 2, 1], 0.7), inputs(7, width=3))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 32))
def test_every_row_is_in_one_group_with_rows_of_like_length(lengths, heads):
    groups = groups_of(lengths, heads)
    places = sorted((row.start, row.stop) for group in groups for row in group)
    edges = [0, *accumulate(lengths)]
    assert places == [edge for edge in pairwise(edges) if edge[0] < edge[1]]
    for group in groups:
        assert sum(map(len, group)) >= module.ALIKE * len(group[0]) * len(group)


def test_scores_of_a_group_do_not_outgrow_their_room(monkeypatch):
    """A hundred rows alike, of more scores than may be there at once."""
    monkeypatch.setattr(module, "SCORES", 4 * 20 * 20 * 6)
    assert [len(group) for group in groups_of([20] * 100, 6)] == [4] * 25


@pytest.mark.parametrize("numba", [False, True])
@pytest.mark.parametrize("lengths", [[2], [95, 97], [300, 290, 120, 7], [540]])
def test_in_bfloat16_it_errs_no_more_than_torch(lengths, numba, monkeypatch, numba_cache):
    if numba:
        pytest.importorskip("numba", reason="the extra named fast is not installed")
        monkeypatch.setattr(forms, "_table", {})
        assert forms.use_numba(torch.bfloat16, numba_cache) == ""
    exact = inputs(sum(lengths), width=64)
    narrow = [t.detach().bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    upstream = torch.randn_like(narrow[0])
    truths = results(by_torch, exact, lengths, 0.125, upstream.double())
    errors = []
    for attend in (causal_attention, by_torch):
        found = zip(results(attend, narrow, lengths, 0.125, upstream), truths, strict=True)
        errors.append(max(float(((a - b).norm() / b.norm()).detach()) for a, b in found))
    assert errors[0] < 1.1 * errors[1] < 0.01


def test_no_token_sees_a_later_one():
    query, key, value = inputs(200)
    before = causal_attention(query, key, value, [200], 1.0)
    with torch.no_grad():
        key[:, 150:] = 1e9
        value[:, 150:] = 1e30
    assert torch.equal(causal_attention(query, key, value, [200], 1.0)[:, :150], before[:, :150])


def test_rows_of_no_token_give_nothing():
    assert causal_attention(*inputs(0), [], 1.0).shape == (6, 0, 8)
    assert causal_attention(*inputs(3), [0, 3, 0], 1.0).isfinite().all()


def test_no_row_sees_another():
    query, key, value = inputs(200)
    before = causal_attention(query, key, value, [90, 110], 1.0)
    with torch.no_grad():
        key[:, :90] = 1e9
        value[:, :90] = 1e30
    assert torch.equal(causal_attention(query, key, value, [90, 110], 1.0)[:, 90:], before[:, 90:])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_take_it_in_bfloat16_only(dtype, monkeypatch):
    """In float32 torch's kernel is the faster one."""
    taken = []
    apply = module._CausalAttention.apply
    monkeypatch.setattr(module._CausalAttention, "apply", lambda *t: taken.append(t) or apply(*t))
    row = [t[None] for t in inputs(20, dtype=dtype)]
    causal, masked = Rows([12, 8], [None, None]), Rows([12, 8], [None, torch.ones(8, 8, dtype=torch.bool)])
    attention_of_rows(*row, causal)
    assert len(taken) == (dtype == torch.bfloat16)
    attention_of_rows(*row, masked)
    attention_of_rows(*row, causal, dropout=0.1)
    attention_of_rows(*(t.repeat(1, 1, 60, 1) for t in row), Rows([1200], [None]))
    torch.func.vmap(lambda q: attention_of_rows(q, *row[1:], causal))(row[0][None])
    assert len(taken) == (dtype == torch.bfloat16)
