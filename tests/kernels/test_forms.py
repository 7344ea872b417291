"""Every kernel in every form against plain formulas in float64."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankfold.kernels import torch_forms
from rankfold.kernels.forms import KERNELS, Form

FORMATS = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(scope="module")
def numba(numba_cache):
    pytest.importorskip("numba", reason="the extra named fast is not installed")
    from rankfold.kernels import numba_forms

    assert [numba_forms.start(dtype, numba_cache) for dtype in FORMATS] == ["", ""]
    return numba_forms


@pytest.fixture(scope="module", params=["torch", "numba"])
def form(request) -> Form:
    return torch_forms if request.param == "torch" else request.getfixturevalue("numba")


def random(*shape, dtype, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator)).to(dtype)


def rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def gated(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = (each.chunk(2, -1) for each in (cos, sin))
    return torch.cat([a * cos[0] - b * sin[0], b * cos[1] + a * sin[1]], -1)


def causal(scores, scale):
    queries, keys = scores.shape[-2:]
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    return torch.softmax((scale * scores).masked_fill(~seen, -math.inf), -1)


def truth(function, tensors, trained, upstream):
    """The values and the gradients by the first ``trained`` of ``tensors``, in float64."""
    exact = [t.double().requires_grad_(place < trained) for place, t in enumerate(tensors)]
    value = function(*exact)
    return [value.detach(), *torch.autograd.grad(value, exact[:trained], upstream.double())]


def assert_near(found, wanted, dtype):
    assert len(found) == len(wanted)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.shape == exact.shape
        allowed = 1e-5 if ours.dtype == torch.float32 and dtype == torch.float32 else 2**-7
        assert float((ours.double() - exact).norm()) <= allowed * float(exact.norm()) + 1e-6


def shapes(*most):
    return st.tuples(*(st.integers(1, each) for each in most))


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None, max_examples=25)
@given(shape=shapes(3, 70))
def test_rms_norm(form, dtype, shape):
    x, weight, grad = random(2, *shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1), None
    grad = random(2, *shape, dtype=dtype, seed=2)
    out, inverse = form.rms_norm(x, weight, EPS)
    assert (out.dtype, inverse.dtype, inverse.shape) == (dtype, torch.float32, (2, shape[0], 1))
    found = [out, form.rms_norm_gradient(grad, x, weight, inverse)]
    assert_near(found, truth(rms_norm, [x, weight], 1, grad), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None, max_examples=25)
@given(shape=shapes(3, 70), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_gated(form, dtype, shape, size):
    gate, up, grad = (random(2, *shape, dtype=dtype, seed=n, size=size) for n in range(3))
    wanted = truth(gated, [gate, up], 2, grad)
    assert_near([form.gated(gate, up), *form.gated_gradient(grad, gate, up)], wanted, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None, max_examples=25)
@given(shape=shapes(2, 3, 9), half=st.integers(1, 20), apart=st.booleans())
def test_rotated(form, dtype, shape, half, apart):
    rows, heads, tokens = shape
    x, grad = (random(rows, heads, tokens, 2 * half, dtype=dtype, seed=n) for n in range(2))
    angles = [random(rows if apart else 1, 1, tokens, 2 * half, dtype=dtype, seed=n) for n in (2, 3)]
    found = [form.rotated(x, *angles), form.rotated_gradient(grad, *angles)]
    assert_near(found, truth(rotated, [x, *angles], 1, grad), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None, max_examples=25)
@given(shape=shapes(6, 90), smooth=st.sampled_from([0.0, 0.1]), size=st.sampled_from([1.0, 20.0]))
def test_losses(form, dtype, shape, smooth, size):
    logits = random(*shape, dtype=dtype, size=size)
    targets = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(1))

    def loss(logits):
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smooth)

    wanted = truth(loss, [logits], 1, torch.ones(shape[0]))
    alone, _ = form.losses(logits.clone(), targets, smooth, False)
    found = form.losses(logits.clone(), targets, smooth, True)
    assert torch.equal(alone, found[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), wanted[0], atol=1e-5, rtol=1e-5)
    assert_near(found[1:], wanted[1:], dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@settings(deadline=None, max_examples=25)
@given(shape=shapes(2, 3, 40), earlier=st.integers(0, 40), scale=st.sampled_from([0.125, 1.0, 5.0]))
def test_causal_shares(form, dtype, shape, earlier, scale):
    scores = random(*shape, earlier + shape[2], dtype=torch.float32)
    grad = random(*scores.shape, dtype=dtype, seed=1)
    wanted = truth(lambda s: causal(s, scale), [scores], 1, grad)
    shares = form.causal_shares(scores.clone(), scale, dtype)
    assert shares.dtype == dtype
    assert torch.equal(shares == 0, (shares == 0) | (causal(scores, scale) == 0))
    assert_near([shares], wanted[:1], dtype)
    found = form.causal_shares_gradient(grad.clone(), shares, scale).double()
    allowed = 1e-5 if dtype == torch.float32 else 2**-6
    summands = scale * float((grad.double() * wanted[0]).norm())  # of the gradient, which may cancel
    assert float((found - wanted[1]).norm()) <= allowed * summands


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_told_by_every_kernel(form, dtype, bad):
    """So that a run stops at it: where torch's result is not finite, none is."""
    x = random(4, 40, dtype=dtype)
    x[1, 17] = bad
    clean, weight = random(4, 40, dtype=dtype, seed=1), random(40, dtype=dtype, seed=2)
    targets, inverse = torch.tensor([0, 17, 17, 3]), torch.ones(4, 1)
    wide = x.float()
    shares = torch.rand(1, 4, 40).to(dtype)

    def finite(form):
        found = [
            form.rms_norm(x, weight, EPS)[0],
            form.rms_norm_gradient(x, clean, weight, inverse),
            form.gated(clean, x),
            *form.gated_gradient(x, clean, clean),
            form.rotated(x[None], clean[None], clean[None]),
            form.losses(x.clone(), targets, 0.0, True)[0],
            form.causal_shares(wide[None].clone(), 1.0, dtype),
            form.causal_shares_gradient(x[None].clone(), shares, 1.0),
        ]
        return [bool(each.isfinite().all()) for each in found]

    assert finite(form) == finite(torch_forms)


def test_rows_of_no_number_and_no_rows_pass(form):
    for dtype in FORMATS:
        none = torch.zeros(0, 8, dtype=dtype)
        assert form.rms_norm(none, none.new_ones(8), EPS)[0].shape == (0, 8)
        assert form.gated(none, none).shape == (0, 8)
        assert form.losses(none, torch.zeros(0, dtype=torch.long), 0.0, True)[1].shape == (0, 8)
        assert form.rotated(none[None], none, none).shape == (1, 0, 8)


def test_tensors_with_gaps_and_other_strides_are_read_right(form):
    for dtype in FORMATS:
        whole = random(6, 80, dtype=dtype)
        gapped, tall = whole[:, ::2], random(40, 6, dtype=dtype, seed=1).t()
        torch.testing.assert_close(
            form.gated(gapped, tall), form.gated(gapped.contiguous(), tall.contiguous())
        )
        weight = whole[0, ::2]
        for ours, same in zip(
            form.rms_norm(tall, weight, EPS),
            form.rms_norm(tall.contiguous(), weight.contiguous(), EPS),
            strict=True,
        ):
            torch.testing.assert_close(ours, same)


def test_what_is_not_said_to_be_used_up_stays(form):
    gate, up, grad = (random(3, 20, dtype=torch.bfloat16, seed=n) for n in range(3))
    before = [t.clone() for t in (gate, up, grad)]
    form.gated_gradient(grad, gate, up)
    form.gated(gate, up)
    form.rms_norm_gradient(grad, gate, up[0], torch.ones(3, 1))
    form.rotated(gate[None], up, grad)
    assert all(torch.equal(a, b) for a, b in zip(before, (gate, up, grad), strict=True))


def test_each_form_has_every_kernel_with_the_same_parameters(numba):
    wanted = {name: list(inspect.signature(getattr(torch_forms, name)).parameters) for name in KERNELS}
    for name in KERNELS:
        assert list(inspect.signature(getattr(numba, name)).parameters) == wanted[name]
    assert len(KERNELS) == 9
