"""As many tokens at once as keep products at their speed."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from rankfold.data.order.batches import MICRO_BATCH_TOKENS
from rankfold.train.planning import budget
from rankfold.train.planning.budget import GAIN, MOST, fast_tokens

HALF = torch.bfloat16


@pytest.fixture
def speeds(monkeypatch):
    """Operations a second by how many tokens a product has; what was asked is kept."""
    asked = []

    def measured(_, dtype, shape):
        asked.append((dtype, shape))
        return table[shape[0] // MICRO_BATCH_TOKENS]

    table = {}
    monkeypatch.setattr(budget, "product_speed", measured)
    return table, asked


@pytest.mark.parametrize(
    ("found", "times"),
    [
        ({1: 1e12, 2: 1.05e12}, 1),
        ({1: 1e12, 2: 2e12, 4: 2.1e12}, 2),
        ({1: 1e12, 2: 2e12, 4: 3e12, 8: 1e12}, 4),
        ({1: 1e12, 2: 2e12, 4: 4e12, 8: 8e12}, 8),
    ],
)
def test_tokens_are_doubled_as_long_as_that_makes_products_faster(speeds, found, times):
    table, asked = speeds
    table.update(found)
    assert fast_tokens(tiny_llama(), HALF) == times * MICRO_BATCH_TOKENS <= MOST
    width = tiny_llama().config.hidden_size
    assert {(dtype, shape[1:]) for dtype, shape in asked} == {(HALF, (width, width))}
    assert GAIN > 1


def test_a_product_that_takes_long_is_large_enough(speeds):
    table, asked = speeds
    table[1] = 2 * MICRO_BATCH_TOKENS * tiny_llama().config.hidden_size ** 2 / 0.1
    assert fast_tokens(tiny_llama(), HALF) == MICRO_BATCH_TOKENS
    assert len(asked) == 1


def test_in_float32_nothing_is_timed(speeds):
    assert fast_tokens(tiny_llama(), torch.float32) == MICRO_BATCH_TOKENS
    assert speeds[1] == []
