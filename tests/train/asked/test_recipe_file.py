from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rankfold import Recipe
from rankfold.errors import ConfigError
from rankfold.train.asked.advise import settle
from rankfold.train.asked.recipe_file import changed_recipe, parse_changes, read_recipe, resolved_recipe


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_text


def test_a_recipe_is_read_with_numbers_as_people_write_them(write):
    settings = read_recipe(write("data: a.jsonl\nout: run\nlearning_rate: 1e-4\nrank: 8\n"))
    recipe = Recipe.of(settings)
    assert (recipe.learning_rate, recipe.rank, str(recipe.data)) == (1e-4, 8, "a.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 8\nrank: 9\n", "'rank' is given twice"),
        ("- rank\n", "wanted lines like `rank: 16`"),
        ("rank: [\n", "line 2, column 1"),
        ("rank: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("1: 2\n", "wanted lines like"),
        ("", "wanted lines like"),
        ("\x00", "not a recipe in YAML"),
    ],
)
def test_what_is_no_recipe_is_told_with_its_place(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(text))


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the recipe .*No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_words_are_settings():
    assert parse_changes(["rank=8", "data=a=b.jsonl"]) == {"rank": "8", "data": "a=b.jsonl"}


@pytest.mark.parametrize("word", ["rank", "=8", "--rank=8", "ra nk=8"])
def test_words_of_another_form_are_refused(word):
    with pytest.raises(ConfigError, match="wanted words like rank=8"):
        parse_changes([word])


@given(
    rank=st.one_of(st.none(), st.integers(1, 64)),
    rate=st.one_of(st.none(), st.floats(1e-7, 1.0)),
    rows=st.integers(1, 20_000),
    parameters=st.integers(1, 10**11),
)
def test_a_resolved_recipe_settles_to_the_same_settings(rank, rate, rows, parameters):
    recipe = Recipe.of({"data": "a", "out": "b", "rank": rank, "learning_rate": rate})
    settings = settle(recipe, rows, parameters)
    text = yaml.safe_dump(resolved_recipe(recipe, settings))
    again = settle(Recipe.of(yaml.safe_load(text)), rows, parameters)
    for name in ("rank", "alpha", "learning_rate", "epochs", "rows_per_step", "steps", "warmup_steps"):
        assert getattr(again, name) == getattr(settings, name)


def test_a_resolved_recipe_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "x"}\n')
    Path("base").mkdir()
    given = {"model": "base", "data": "a.jsonl:2,b.jsonl", "held_out": "b.jsonl", "out": "run"}
    recipe = Recipe.of(given)
    resolved = yaml.safe_load(yaml.safe_dump(resolved_recipe(recipe, settle(recipe, 10, 10))))
    monkeypatch.chdir("/")
    again = Recipe.of(resolved)
    assert again.model == str(tmp_path / "base")
    assert again.held_out == str(tmp_path / "b.jsonl")
    assert [(source.path, source.weight) for source in again.data] == [
        (str(tmp_path / "a.jsonl"), 2.0),
        (str(tmp_path / "b.jsonl"), 1.0),
    ]


def test_names_that_are_no_paths_stay_as_they_are():
    recipe = Recipe.of({"model": "org/model", "data": "org/set:train", "out": "run"})
    resolved = resolved_recipe(recipe, settle(recipe, 10, 10))
    assert (resolved["model"], resolved["data"]) == ("org/model", "org/set:train")


def test_changes_are_accepted_by_name_and_the_others_all_listed(tmp_path):
    saved = {"data": "a.jsonl", "out": "elsewhere", "rank": 8}
    assert changed_recipe(saved, {"samples": "9"}, tmp_path).samples == 9
    assert changed_recipe(saved, {"rank": "8"}, tmp_path).out == tmp_path
    with pytest.raises(
        ConfigError, match=r"may change keep_checkpoints(.|\n)*rank: 8 -> 9(.|\n)*seed: 0 -> 3"
    ):
        changed_recipe(saved, {"rank": 9, "seed": 3}, tmp_path)
