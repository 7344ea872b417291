from __future__ import annotations

import pytest

from rankfold import Recipe
from rankfold.train.asked.advise import settle

MILLION = 1_000_000


def recipe(**options) -> Recipe:
    return Recipe.of({"data": "a", "out": "b"} | options)


@pytest.mark.parametrize(
    ("rows", "parameters", "expected"),
    [
        (264, 135 * MILLION, (16, 32.0, 3, 8, 99, 6e-4)),
        (4000, 135 * MILLION, (16, 32.0, 1, 16, 250, 4e-4)),
        (20_000, 8000 * MILLION, (32, 64.0, 1, 16, 1250, 2e-4)),
        (20_000, 70_000 * MILLION, (32, 64.0, 1, 16, 1250, 1e-4)),
        (5, 135 * MILLION, (16, 32.0, 3, 8, 3, 6e-4)),
    ],
)
def test_what_is_left_open_is_chosen_by_size(rows, parameters, expected):
    chosen = settle(recipe(), rows, parameters)
    numbers = (chosen.rank, chosen.alpha, chosen.epochs, chosen.rows_per_step, chosen.steps)
    assert numbers == expected[:5]
    assert chosen.learning_rate == pytest.approx(expected[5])
    assert all(chosen.reasons.values())


def test_what_is_set_is_kept_and_said_to_be_so():
    chosen = settle(recipe(rank=4, learning_rate=1e-5, epochs=7), 100, MILLION)
    assert (chosen.rank, chosen.alpha, chosen.learning_rate, chosen.epochs) == (4, 8, 1e-5, 7)
    assert chosen.reasons["rank"] == "as given"
    assert chosen.reasons["alpha"] != "as given"
