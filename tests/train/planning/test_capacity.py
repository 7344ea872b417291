from __future__ import annotations

import math

import pytest

from rankfold.train.planning.capacity import Capacity


def capacity(rank: int = 16, numbers: int = 1_000_000, tokens: int = 100_000, bits: float = 4.0) -> Capacity:
    return Capacity(rank=rank, numbers=numbers, tokens=tokens, loss=bits * math.log(2))


def test_what_is_told_and_held_are_bits():
    found = capacity()
    assert found.told == pytest.approx(400_000)
    assert found.held == 2_000_000
    assert found.share == 1
    assert found.sentence == "100,000 trained tokens of 4.0 bits; the adapter holds up to 2.00 Mbit: enough"
    assert found.advice == ""


def test_where_more_is_told_than_is_held_a_rank_is_named():
    found = capacity(tokens=1_500_000)
    assert found.share == pytest.approx(1 / 3)
    assert found.rank_for_all == 64
    assert "an adapter of rank 16 holds 33%" in found.advice
    assert "rank 64 has room for them" in found.advice


def test_beyond_a_sensible_rank_training_all_weights_is_the_better_tool():
    found = capacity(tokens=20_000_000)
    assert found.rank_for_all > 256
    assert "training all weights is the better tool" in found.advice
    assert "how the rows are written" in found.advice


def test_rows_that_tell_nothing_fit_anywhere():
    assert capacity(bits=0.0).share == 1
    assert capacity(bits=0.0).rank_for_all == 1
