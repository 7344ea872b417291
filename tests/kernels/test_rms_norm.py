"""The fused RMS norm against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankfold.kernels.rms_norm import rms_norm


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(len(shape))
    return torch.randn(*shape, dtype=dtype).requires_grad_(), torch.rand(shape[-1], dtype=dtype) + 0.5


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    width=st.integers(1, 9),
    eps=st.sampled_from([1e-6, 1e-2]),
)
def test_values_and_gradients_are_those_of_torch(shape, width, eps):
    x, weight = inputs(*shape, width)
    found, wanted = rms_norm(x, weight, eps), F.rms_norm(x, (width,), weight, eps)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    got, expected = (torch.autograd.grad(out, x, upstream)[0] for out in (found, wanted))
    torch.testing.assert_close(got, expected)


def test_the_gradient_is_that_of_small_differences():
    x, weight = inputs(3, 4)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, weight, 0.1), x)


def test_a_row_of_zeros_stays_zero_and_its_gradient_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32_and_comes_in_the_dtype_of_the_product(held):
    x, weight = inputs(5, 64)
    half, weight = x.detach().bfloat16().requires_grad_(), weight.to(held)
    found = rms_norm(half, weight, 1e-6)
    assert found.dtype == held
    wanted = F.rms_norm(half.double(), (64,), weight.double(), 1e-6)
    torch.testing.assert_close(found.double(), wanted, atol=0, rtol=2**-7)
    upstream = torch.randn(5, 64, dtype=torch.float64).to(held)
    (got,) = torch.autograd.grad(found, half, upstream)
    (expected,) = torch.autograd.grad(wanted, half, upstream.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=2**-7, rtol=2**-7)


def test_only_the_input_and_a_number_a_row_are_kept():
    x, weight = inputs(6, 32, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    sizes = {t.data_ptr(): t.numel() * t.itemsize for t in kept if t.data_ptr() != weight.data_ptr()}
    assert sorted(sizes.values()) == [6 * 4, 6 * 32 * 2]
