"""Attention by whole products against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankfold.kernels import causal_attention as module
from rankfold.kernels.causal_attention import causal_attention
from rankfold.kernels.rows_apart import attention_of_row

HEADS = [(1, 1), (4, 2), (6, 2), (3, 1)]


def inputs(tokens, heads=(6, 2), width=8, dtype=torch.float64):
    torch.manual_seed(tokens)
    # As a model lays them out: tokens first, heads beside each other.
    return [
        torch.randn(tokens, n, width, dtype=dtype).transpose(0, 1).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]


def by_torch(query, key, value, scale):
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    heads=st.sampled_from(HEADS),
    scale=st.sampled_from([0.3, 1.0, 5.0]),
    block=st.sampled_from([1, 3, 7, 64]),
)
def test_values_and_gradients_are_those_of_torch(tokens, heads, scale, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        tensors = inputs(tokens, heads)
        found, wanted = causal_attention(*tensors, scale), by_torch(*tensors, scale)
        torch.testing.assert_close(found, wanted)
        upstream = torch.randn_like(wanted)
        for got, expected in zip(
            torch.autograd.grad(found, tensors, upstream),
            torch.autograd.grad(wanted, tensors, upstream),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


def test_the_gradient_is_that_of_small_differences(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, 0.7), inputs(7, width=3))


@pytest.mark.parametrize("tokens", [2, 95, 97, 300, 540])
def test_in_bfloat16_it_errs_no_more_than_torch(tokens):
    exact = inputs(tokens, width=64)
    narrow = [t.detach().bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    truth = by_torch(*exact, 0.125)
    upstream = torch.randn_like(truth).bfloat16()
    truths = truth, *torch.autograd.grad(truth, exact, upstream.double())
    errors = []
    for attend in (causal_attention, by_torch):
        found = attend(*narrow, 0.125)
        all_found = found, *torch.autograd.grad(found, narrow, upstream)
        pairs = zip(all_found, truths, strict=True)
        errors.append(max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs))
    assert errors[0] < 1.1 * errors[1] < 0.01


def test_no_token_sees_a_later_one():
    query, key, value = inputs(200)
    before = causal_attention(query, key, value, 1.0)
    with torch.no_grad():
        key[:, 150:] = 1e9
        value[:, 150:] = 1e30
    assert torch.equal(causal_attention(query, key, value, 1.0)[:, :150], before[:, :150])


def test_rows_of_no_token_give_nothing():
    assert causal_attention(*inputs(0), 1.0).shape == (6, 0, 8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_takes_it_in_bfloat16_only(dtype, monkeypatch):
    """In float32 torch's kernel is the faster one, and nothing changes."""
    taken = []
    apply = module._CausalAttention.apply
    monkeypatch.setattr(module._CausalAttention, "apply", lambda *t: taken.append(t) or apply(*t))
    row = inputs(20, dtype=dtype)
    attention_of_row(*row, None, None, 0.0)
    assert len(taken) == (dtype == torch.bfloat16)
    attention_of_row(*row, torch.ones(20, 20, dtype=torch.bool), None, 0.0)
    attention_of_row(*row, None, None, 0.1)
    torch.func.vmap(lambda q: attention_of_row(q, *row[1:], None, None, 0.0))(row[0][None])
    assert len(taken) == (dtype == torch.bfloat16)
