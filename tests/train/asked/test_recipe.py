from __future__ import annotations

from pathlib import Path

import pytest

from rankfold import Recipe
from rankfold.data.shapes.sources import Source
from rankfold.errors import ConfigError


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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("num_train_epochs", "is called 'epochs' here"),
        ("lora_alpha", "is called 'alpha' here"),
        ("evaluation_strategy", "say evaluate_every_steps"),
        ("rnak", r"did you mean 'rank'\?"),
    ],
)
def test_names_of_other_tools_are_understood_and_named(name, told):
    with pytest.raises(ConfigError, match=told):
        Recipe.of({"data": "a", "out": "b", name: 1})


def test_data_is_a_name_a_path_or_a_list_of_sources(tmp_path):
    sources = [Source("a.jsonl", 2, "alpaca")]
    for data in ("org/name:train", Path("a.jsonl"), sources):
        recipe = Recipe.of({"data": data, "out": tmp_path})
        assert recipe.data == data
        told = recipe.model_dump(mode="json")
        assert Recipe.of(told).model_dump(mode="json") == told


def test_a_share_of_bad_rows_is_below_one(tmp_path):
    with pytest.raises(ConfigError, match="skip_bad: input should be less than 1, got '1'"):
        Recipe.of({"data": "a", "out": tmp_path, "skip_bad": "1"})
