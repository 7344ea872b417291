from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold.kernels import row_norm
from rankfold.kernels.row_norm import low_rank_row_norm


def parts(rows: int = 40, columns: int = 70, rank: int = 5, dtype=torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = (rows, columns), (rank, columns), (rows, rank)
    weight, lora_a, lora_b = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight.to(dtype), lora_a, lora_b


def dense(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    total = weight.double() + scale * lora_b.double() @ lora_a.double()
    return torch.linalg.vector_norm(total, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 0.01, 1.0, 1e4])
def test_the_norm_is_the_dense_one(dtype, size):
    weight, lora_a, lora_b = parts(dtype=dtype)
    got = low_rank_row_norm(weight, lora_a, size * lora_b, 1.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    expected = dense(weight, lora_a, size * lora_b, 1.7)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)


def test_a_transposed_weight_gives_the_same():
    weight, lora_a, lora_b = parts()
    got = low_rank_row_norm(weight.T.contiguous().T, lora_a, lora_b, 0.5)
    torch.testing.assert_close(got, low_rank_row_norm(weight, lora_a, lora_b, 0.5))


def test_without_an_update_the_norm_is_the_rows_own_to_the_bit():
    weight, lora_a, lora_b = parts()
    plain = low_rank_row_norm(weight, lora_a, torch.zeros_like(lora_b), 2.0)
    torch.testing.assert_close(plain, torch.linalg.vector_norm(weight, dim=1))
    assert torch.equal(plain, low_rank_row_norm(weight, 3 * lora_a, torch.zeros_like(lora_b), 0.1))


def test_a_half_precision_weight_is_widened_in_blocks_to_the_same_result(monkeypatch):
    weight, lora_a, lora_b = parts(dtype=torch.bfloat16)
    whole = low_rank_row_norm(weight, lora_a, lora_b, 0.5)
    monkeypatch.setattr(row_norm, "BLOCK_ELEMENTS", 7 * weight.shape[1] + 1)
    torch.testing.assert_close(low_rank_row_norm(weight, lora_a, lora_b, 0.5), whole)


@pytest.mark.parametrize("left", [1e-1, 1e-2])
def test_a_partly_cancelled_weight_keeps_the_digits_that_its_parts_have(left):
    _, lora_a, lora_b = parts()
    weight = -(1 - left) * (lora_b @ lora_a)
    got, expected = low_rank_row_norm(weight, lora_a, lora_b, 1.0), dense(weight, lora_a, lora_b, 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5 / left**2, atol=0)


def test_a_cancelled_weight_has_a_small_norm_and_not_a_wrong_or_missing_one():
    _, lora_a, lora_b = parts()
    weight = -(lora_b @ lora_a)
    got = low_rank_row_norm(weight, lora_a, lora_b, 1.0)
    share = got / torch.linalg.vector_norm(weight, dim=1)
    assert (share > 3e-4).all()
    assert (share < 3e-3).all()


def test_zero_rows_have_a_norm_that_can_be_divided_by():
    weight, lora_a, lora_b = parts()
    norms = low_rank_row_norm(0 * weight, lora_a, 0 * lora_b, 1.0)
    assert (norms > 0).all()
    assert (norms < 1e-18).all()


def test_autocast_does_not_round_the_norm():
    weight, lora_a, lora_b = parts()
    with torch.autocast("cpu", torch.bfloat16):
        got = low_rank_row_norm(weight, lora_a, lora_b, 0.5)
    assert torch.equal(got, low_rank_row_norm(weight, lora_a, lora_b, 0.5))


def test_nothing_of_the_weights_size_is_made_and_no_gradient_kept():
    weight, lora_a, lora_b = parts(rows=600, columns=500)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() != weight.data_ptr())
            return out

    with Watch():
        norms = low_rank_row_norm(weight, lora_a.requires_grad_(), lora_b.requires_grad_(), 0.5)
    assert not norms.requires_grad
    assert max(sizes) <= 600 * 5
