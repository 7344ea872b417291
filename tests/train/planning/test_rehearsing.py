"""General rows that are trained on too, and the others, which tell what was forgotten."""

from __future__ import annotations

import pytest

from rankfold import Recipe
from rankfold.errors import ConfigError
from rankfold.train.planning.rows import prepare


@pytest.fixture
def recipe(tiny_folder, write_rows, joke_rows, tmp_path):
    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "data": write_rows(joke_rows), "out": tmp_path / "run"}
        return Recipe.of(settings | options)

    return make


@pytest.fixture
def general(write_rows):
    """Ten conversations and four texts."""
    chats = [{"prompt": f"What is {n}?", "completion": f"It is number {n}."} for n in range(10)]
    return str(write_rows([*chats, *({"text": f"Text {n}."} for n in range(4))], "general.jsonl"))


def test_a_share_is_trained_on_and_the_rest_tells_what_was_forgotten(recipe, general):
    plain = prepare(recipe(general=general))
    found = prepare(recipe(general=general, rehearse=0.15))
    drawn = [row.origin for row in found.rows.train if "general.jsonl" in row.origin]
    left = [row.example.origin for row in found.general]
    assert len(plain.general) == 14
    assert len(drawn) == round(0.15 * len(plain.rows.train)) == 3
    assert len(left) == 11
    assert not set(drawn) & set(left)
    assert len(found.encoded.train) == len(plain.encoded.train) + 3
    assert [row.origin for row in found.rows.held_out] == [row.origin for row in plain.rows.held_out]
    assert any("3 rows of" in note and "are trained on too" in note for note in found.rows.notes)


def test_half_of_the_rows_stay_to_tell_and_that_is_said(recipe, general):
    found = prepare(recipe(general=general, rehearse=1.0))
    drawn = [row for row in found.rows.train if "general.jsonl" in row.origin]
    assert len(drawn) == 5
    assert any("not 22: half of its rows tell" in note for note in found.rows.notes)


def test_rows_of_the_datas_kind_are_drawn(recipe, general, write_rows):
    texts = write_rows([{"text": f"A text about {n} hats and more."} for n in range(20)], "texts.jsonl")
    found = prepare(recipe(data=texts, general=general, rehearse=0.1))
    drawn = [row for row in found.rows.train if "general.jsonl" in row.origin]
    assert len(drawn) == 2
    assert all(not row.messages for row in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rehearse": 0.1}, "name the rows with general"),
        ({"rehearse": 0.1, "general": "none"}, "name the rows with general"),
        ({"rehearse": 1.5}, "rehearse"),
    ],
)
def test_mistakes_are_told(recipe, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(recipe(**options))


def test_rows_of_another_kind_cannot_be_rehearsed(recipe, write_rows):
    texts = str(write_rows([{"text": f"Text {n}."} for n in range(4)], "texts.jsonl"))
    with pytest.raises(ConfigError, match="has no two chat rows"):
        prepare(recipe(rehearse=0.5, general=texts))
