from __future__ import annotations

import pytest
import torch

from rankfold.lora.files.lora_weights import Pair, of_rank, padded


def pair(rows: int = 12, columns: int = 9, rank: int = 5) -> Pair:
    torch.manual_seed(rank)
    return Pair(torch.randn(rank, columns), torch.randn(rows, rank), 2.0, {"lora_B.bias": torch.ones(rows)})


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_pair_is_cut_to_the_best_product_of_that_rank(rank):
    whole = pair()
    dense = whole.B.double() @ whole.A.double()
    u, s, vh = torch.linalg.svd(dense)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    cut, error = of_rank(whole, rank)
    assert (cut.rank, cut.scale) == (rank, whole.scale)
    torch.testing.assert_close(cut.B @ cut.A, best.float(), rtol=1e-4, atol=1e-5)
    assert error == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-6)


def test_a_rank_that_suffices_keeps_the_pair():
    whole = pair()
    assert of_rank(whole, 5) == (whole, 0.0)
    assert of_rank(whole, 9)[0] is whole


def test_a_pair_is_filled_up_without_changing_its_product():
    whole = pair()
    wide = padded(whole, 8)
    assert wide.rank == 8
    assert torch.equal(wide.B @ wide.A, whole.B @ whole.A)
    assert padded(whole, 3) is whole
