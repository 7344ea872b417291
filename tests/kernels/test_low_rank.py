from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.kernels.low_rank import low_rank_delta, low_rank_update

sizes = st.integers(1, 6)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.floats(-4, 4))
def test_the_update_equals_the_dense_product(rows, d_in, d_out, rank, scale):
    x = torch.randn(rows, d_in, dtype=torch.float64)
    a, b = torch.randn(rank, d_in, dtype=torch.float64), torch.randn(d_out, rank, dtype=torch.float64)
    torch.testing.assert_close(low_rank_update(x, a, b, scale), x @ (scale * b @ a).T)


def test_its_gradients_are_right():
    x, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 4), (5, 2))
    )
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank_update(x, a, b, 0.7), (x, a, b))


def test_the_update_comes_in_the_dtype_of_the_factors():
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert low_rank_update(x, torch.randn(2, 4), torch.randn(3, 2), 1.0).dtype == torch.float32


def test_the_delta_is_exact_for_half_precision_factors():
    a, b = torch.randn(2, 4).bfloat16(), torch.randn(3, 2).bfloat16()
    assert torch.equal(low_rank_delta(a, b, 2.0), 2 * (b.float() @ a.float()))
