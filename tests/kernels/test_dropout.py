from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.kernels.dropout import LEVELS, DropMask, random_words

ALMOST_NEVER = 5.0  # standard deviations


def mask(seed: int, p: float, *shape: int) -> Tensor:
    return drop_mask(seed, p).expand(torch.empty(shape))


def drop_mask(seed: int, p: float) -> DropMask:
    return DropMask(seed, round((1 - p) * LEVELS))


@settings(deadline=None)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 9))
def test_the_words_are_those_of_splitmix64(seed, count):
    """Against the generator's definition in integers of any size."""
    whole, state, expected = (1 << 64) - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & whole
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & whole
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & whole
        expected.append(word ^ (word >> 31))
    assert [word & whole for word in random_words(seed, count).tolist()] == expected


def test_the_words_are_the_published_ones():
    """Of seed 1234567, as other implementations of SplitMix64 test themselves."""
    assert random_words(1234567, 2).tolist() == [6457827717110365317, 3203168211198807973]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_mask_has_the_shape_and_dtype_of_what_it_is_for_and_holds_ones_and_zeros(shape, dtype):
    like = torch.empty(shape, dtype=dtype)
    found = drop_mask(7, 0.4).expand(like)
    assert (found.shape, found.dtype) == (like.shape, dtype)
    assert bool(((found == 0) | (found == 1)).all())
    assert torch.equal(found, drop_mask(7, 0.4).expand(like))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 3), (1000, 575), (3, 1 << 17), (4, 0)], ids=str)
def test_blocks_of_rows_are_the_mask(shape):
    rows = torch.empty(shape)
    parts = list(drop_mask(7, 0.4).blocks(rows))
    assert [kept.shape for _, kept in parts] == [rows[part].shape for part, _ in parts]
    assert torch.equal(torch.cat([kept for _, kept in parts]), drop_mask(7, 0.4).expand(rows))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_as_many_are_kept_as_was_asked_for(p):
    kept = [float(mask(seed, p, 700, 600).mean()) for seed in range(8)]
    spread = math.sqrt(p * (1 - p) / (700 * 600))
    assert all(abs(share - (1 - p)) < ALMOST_NEVER * spread + 2**-17 for share in kept)
    assert abs(sum(kept) / 8 - (1 - p)) < ALMOST_NEVER * spread / math.sqrt(8) + 2**-17


def test_all_levels_are_drawn_equally_often():
    """Chi-square over all 65,536 values of 16 bits; its spread is sqrt(2 * degrees of freedom)."""
    draws = random_words(99, 1 << 20).view(torch.int16).int() + LEVELS // 2
    counts, expected = torch.bincount(draws, minlength=LEVELS).double(), draws.numel() / LEVELS
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - (LEVELS - 1)) < ALMOST_NEVER * math.sqrt(2 * (LEVELS - 1))


@pytest.mark.parametrize("width", [64, 575, 576, 1536])
def test_rows_and_columns_are_independent(width):
    """Of products of neighbours, of whole rows and of whole columns, against a normal distribution."""
    p, rows = 0.1, 1024
    found = mask(width, p, rows, width).double()
    centred = (found - (1 - p)) / math.sqrt(p * (1 - p))
    for lag in (1, 2, 3, 4, 8, width // 2):
        for pairs in (centred[:, lag:] * centred[:, :-lag], centred[lag:] * centred[:-lag]):
            assert abs(float(pairs.sum())) < ALMOST_NEVER * math.sqrt(pairs.numel())
    for dim, length in ((0, rows), (1, width)):
        sums = centred.sum(dim) / math.sqrt(length)
        chi = float((sums**2).sum())
        assert abs(chi - sums.numel()) < ALMOST_NEVER * math.sqrt(2 * sums.numel())
        assert float(sums.abs().max()) < ALMOST_NEVER


def test_masks_of_two_seeds_have_nothing_in_common():
    """Neighbouring seeds too, and those that lie one state of the generator apart."""
    first = mask(5, 0.5, 400, 500).double() - 0.5
    for seed in (4, 6, 5 + (1 << 32), -5):
        other = mask(seed, 0.5, 400, 500).double() - 0.5
        assert abs(float((first * other).sum() * 4)) < ALMOST_NEVER * math.sqrt(first.numel())


def test_a_dropped_out_mean_is_exact_because_the_rescaling_is_by_what_is_kept():
    for p in (1e-9, 0.1, 0.3333, 1 - 1e-9):
        drawn = DropMask.draw(p)
        assert drawn.rescale == LEVELS / drawn.kept
        assert abs(drawn.kept / LEVELS - (1 - p)) <= 2**-16
        assert 0 < drawn.kept < LEVELS
    for p in (0.1, 0.37):
        assert abs(DropMask.draw(p).kept / LEVELS - (1 - p)) <= 2**-17


def test_torchs_generator_decides_the_mask():
    torch.manual_seed(3)
    first, second = DropMask.draw(0.1), DropMask.draw(0.1)
    state = torch.get_rng_state()
    third = DropMask.draw(0.1)
    torch.manual_seed(3)
    assert DropMask.draw(0.1) == first != second
    torch.set_rng_state(state)
    assert DropMask.draw(0.1) == third
