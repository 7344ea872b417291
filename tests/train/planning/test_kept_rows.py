from __future__ import annotations

import json
import os
import shutil

import pytest

import rankfold.train.planning.rows as module
from rankfold import Recipe
from rankfold.data.tokens import cache
from rankfold.data.tokens.rows_hash import rows_hash
from rankfold.errors import DataError
from rankfold.train.planning import kept_rows
from rankfold.train.planning.kept_rows import kept_name
from rankfold.train.planning.rows import prepare

ROWS = [
    {"prompt": f"Question {n * 7919 % 10007} of many?", "completion": f"It is {n} <|im_end|>" * (1 + n % 3)}
    for n in range(60)
]


@pytest.fixture(autouse=True)
def everything_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr(cache, "LEAST_ROWS", 1)


@pytest.fixture
def recipe(tiny_folder, write_rows, tmp_path):
    def make(**options) -> Recipe:
        settings = {"model": str(tiny_folder), "data": write_rows(ROWS), "out": tmp_path / "run"}
        return Recipe.of(settings | options)

    return make


def read_again(monkeypatch, recipe) -> int:
    """How often ``prepare`` reads the rows of ``recipe``."""
    read, times = module.read_data, []

    def counted(*arguments):
        times.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(module, "read_data", counted)
    prepare(recipe)
    monkeypatch.setattr(module, "read_data", read)
    return len(times)


def test_rows_that_were_prepared_are_not_read_again_and_are_the_same(recipe, monkeypatch):
    asked = recipe(held_out="0.1")
    first = prepare(asked)
    assert read_again(monkeypatch, asked) == 0
    again = prepare(asked)
    assert rows_hash(again.encoded.train) == rows_hash(first.encoded.train)
    assert rows_hash(again.encoded.held_out) == rows_hash(first.encoded.held_out)
    assert again.rows.held_out == list(first.rows.held_out)
    assert (again.rows.notes, again.rows.shape) == (first.rows.notes, first.rows.shape)
    assert (again.encoded.notes, again.encoded.cut) == (first.encoded.notes, first.encoded.cut)


def test_another_setting_is_another_entry(recipe, tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    others = [{"held_out": 0.2}, {"max_length": 70}, {"train_on": "all"}, {"seed": 3}, {"encoding": "cp1252"}]
    others += [{"shape": "prompt-completion"}, {"leave_out": ["x"]}, {"skip_bad": 0.1}]
    names = {kept_name(recipe(**other), tokenizer) for other in ({}, *others)}
    assert len(names) == 1 + len(others)
    assert kept_name(recipe(epochs=3, rank=2), tokenizer) == kept_name(recipe(), tokenizer)


def test_another_file_or_other_tokens_are_read_again(recipe, monkeypatch):
    asked = recipe()
    prepare(asked)
    with open(asked.data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "One more?", "completion": "Yes, one more."}) + "\n")
    assert read_again(monkeypatch, asked) == 1
    assert read_again(monkeypatch, asked) == 0
    [entry, *_] = (kept_rows.cache_folder() / "tokens").iterdir()
    for entry in (kept_rows.cache_folder() / "tokens").iterdir():
        with (entry / "input_ids").open("r+b") as file:
            file.write(b"\x7f")
    assert read_again(monkeypatch, asked) == 1


@pytest.mark.parametrize("harm", [os.unlink, lambda path: path.write_text("{}")])
def test_a_damaged_entry_is_made_again(recipe, monkeypatch, harm):
    prepare(recipe())
    [entry] = (kept_rows.cache_folder() / "rows").iterdir()
    harm(entry / kept_rows.FACTS)
    assert read_again(monkeypatch, recipe()) == 1


def test_an_entry_whose_tokens_are_gone_goes_too(recipe):
    prepare(recipe())
    shutil.rmtree(kept_rows.cache_folder() / "tokens")
    prepare(recipe(max_length=70))
    assert len([*(kept_rows.cache_folder() / "rows").iterdir()]) == 1


def test_a_fault_in_the_rows_is_told_every_time(recipe, write_rows):
    data = write_rows([*ROWS, {"prompt": "only"}], "other.jsonl")
    for _ in range(2):
        with pytest.raises(DataError, match=r":61: 'completion' is missing"):
            prepare(recipe(data=data))
