from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.judging.held_out import compare
from rankfold.judging.losses import row_losses


def make_rows(count: int, trained: int = 4) -> list[EncodedRow]:
    return [
        EncodedRow(f"f:{n}", [n + 5] * 8, [IGNORE] * (8 - trained) + [n + 5] * trained) for n in range(count)
    ]


def test_row_losses_come_in_the_order_of_the_rows_and_change_nothing():
    model = tiny_llama()
    model.train()
    rows = [EncodedRow(f"f:{n}", list(range(9, 12 + n)), [IGNORE, *range(10, 12 + n)]) for n in (30, 2, 11)]
    together = row_losses(model, rows, 0)
    alone = torch.cat([row_losses(model, [row], 0) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_numbers_are_means_over_tokens_not_rows():
    rows = [*make_rows(1, trained=1), *make_rows(1, trained=7)]
    result = compare(rows, torch.tensor([8.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double(), seed=0)
    assert (result.rows, result.trained_tokens, result.rows_improved) == (2, 8, 1)
    assert (result.base_loss, result.tuned_loss, result.gap) == (1.0, 0.5, -0.5)
    assert result.base_perplexity == pytest.approx(2.718281828)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(-1.0, "better on rows"), (1.0, "worse on rows"), (0.0, "not told apart")],
)
def test_the_verdict_follows_the_interval(shift, verdict):
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(40, generator=generator, dtype=torch.float64) * 10
    noise = torch.randn(40, generator=generator, dtype=torch.float64) * 0.5
    result = compare(make_rows(40), base, base + noise + shift, seed=0)
    assert result.verdict.startswith(verdict)
    assert result.gap_low <= result.gap <= result.gap_high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 experiments with a known gap of 0.1 per token; 95 % of the intervals should hold it."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        base = torch.rand(60, generator=generator, dtype=torch.float64)
        tuned = base + 0.4 + torch.randn(60, generator=generator, dtype=torch.float64)
        result = compare(make_rows(60), base, tuned, seed=1)
        covered += result.gap_low <= 0.1 <= result.gap_high
    assert 180 <= covered <= 198


def test_the_interval_agrees_with_the_normal_approximation():
    generator = torch.Generator().manual_seed(3)
    gaps = torch.randn(400, generator=generator, dtype=torch.float64) * 4
    zero = torch.zeros(400, dtype=torch.float64)
    result = compare(make_rows(400), zero, gaps, seed=0)
    half = 1.96 * float(gaps.std()) / 4 / 400**0.5
    assert result.gap_low == pytest.approx(float(gaps.mean()) / 4 - half, abs=0.01)
    assert result.gap_high == pytest.approx(float(gaps.mean()) / 4 + half, abs=0.01)


@pytest.mark.parametrize(("rows", "cautious"), [(3, True), (19, True), (20, False)])
def test_few_rows_are_a_reason_for_caution(rows, cautious):
    losses = torch.rand(rows, dtype=torch.float64)
    assert compare(make_rows(rows), losses, losses - 1, seed=0).caution.startswith(f"{rows} held") == cautious
