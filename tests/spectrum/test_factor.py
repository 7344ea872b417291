from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.spectrum.explain import demonstrate
from rankfold.spectrum.factor import low_rank_factors, numerical_rank, singular_values
from rankfold.spectrum.plot import plot_singular_values

sizes = st.integers(1, 12)


def planted(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(sizes, sizes, st.data())
def test_factors_of_the_true_rank_are_exact(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = planted(rows, columns, rank)
    factors = low_rank_factors(weight, rank)
    assert (factors.B.shape, factors.A.shape) == ((rows, rank), (rank, columns))
    torch.testing.assert_close(factors.B @ factors.A, weight)


def test_the_error_of_a_lower_rank_is_what_eckart_and_young_say():
    weight = torch.randn(9, 7, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, 8):
        factors = low_rank_factors(weight, rank)
        error = torch.linalg.matrix_norm(weight - factors.B @ factors.A)
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [1, 2, 5, 10])
def test_a_planted_rank_is_found_in_float32(rank):
    assert numerical_rank(planted(10, 14, rank).float()) == rank


def test_a_zero_weight_has_rank_zero():
    assert numerical_rank(torch.zeros(4, 3)) == 0
    assert singular_values(torch.zeros(4, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match=f"from 1 to 3, got {rank}"):
        low_rank_factors(torch.randn(4, 3), rank)


@pytest.mark.parametrize("seed", range(5))
def test_the_demonstration_measures_what_the_tutorial_claims(seed):
    shown = demonstrate(seed)
    assert shown.weight.shape == (10, 10)
    assert shown.rank == 2
    assert (shown.weight.numel(), shown.factors.parameters) == (100, 40)
    assert shown.output_error < 1e-5
    assert shown.starts_as_base
    assert shown.merged_error < 1e-5
    assert shown.merged_type == "Linear"


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_picture_is_a_file_of_its_kind(tmp_path, name, start):
    plot_singular_values(torch.tensor([3.0, 1.0, 0.0]), 2, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
