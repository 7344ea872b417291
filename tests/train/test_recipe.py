from __future__ import annotations

import pytest

from rankfold import Recipe
from rankfold.errors import ConfigError
from rankfold.train.advise import settle

MILLION = 1_000_000


def test_values_may_come_as_text(tmp_path):
    recipe = Recipe.of({"data": "a.jsonl", "out": tmp_path, "learning_rate": "1e-4", "rank": "8"})
    assert (recipe.learning_rate, recipe.rank) == (1e-4, 8)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Recipe.of({"rnak": 4, "rank": 0, "learning_rate": "nan", "epochs": "2.5", "out": "x"})
    message = str(caught.value)
    assert "unknown setting 'rnak' (did you mean 'rank'?)" in message
    assert "data is missing: rows to train on" in message
    assert "rank: input should be greater than or equal to 1, got 0" in message
    assert "learning_rate: input should be a finite number, got 'nan'" in message
    assert "epochs: input should be a valid integer" in message


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rank": "2.5"}, "rank"),
        ({"rank": -4}, "rank"),
        ({"rank": 10**9}, "rank"),
        ({"alpha": "inf"}, "alpha"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": 1e6}, "learning_rate"),
        ({"max_length": 1}, "max_length"),
        ({"seed": -1}, "seed"),
        ({"model": ""}, "model"),
    ],
)
def test_an_impossible_value_is_refused(options, name):
    with pytest.raises(ConfigError, match=f"- {name}: "):
        Recipe.of({"data": "a", "out": "b"} | options)


def test_every_setting_has_a_description():
    assert all(field.description for field in Recipe.model_fields.values())


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
