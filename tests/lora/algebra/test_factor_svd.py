"""The singular values of a product of factors, beside those of the product."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.lora.algebra.factor_svd import svd_of_product

sizes = st.integers(1, 24)


@settings(max_examples=80)
@given(sizes, sizes, sizes, st.integers(0, 2**32 - 1), st.booleans())
def test_it_is_that_of_the_product(out, rank, width, seed, lacking):
    rng = torch.Generator().manual_seed(seed)
    lora_b, lora_a = torch.randn(out, rank, generator=rng), torch.randn(rank, width, generator=rng)
    if lacking:  # columns that say the same, as two copies of an adapter do
        lora_b[:, rank // 2 :] = lora_b[:, :1]
    u, s, v = svd_of_product(lora_b, lora_a)
    product = lora_b.double() @ lora_a.double()
    torch.testing.assert_close(u @ s.diag() @ v.T, product, rtol=1e-12, atol=1e-12)
    expected = torch.linalg.svdvals(product)
    torch.testing.assert_close(s, expected[: len(s)], rtol=1e-10, atol=1e-10)
    assert expected[len(s) :].abs().sum() < 1e-10
    for basis in (u, v):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(s), dtype=torch.float64))


def test_factors_of_zero_have_no_singular_values_but_zero():
    assert not svd_of_product(torch.zeros(5, 2), torch.randn(2, 4)).S.any()
