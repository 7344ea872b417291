"""The data set that ships with the package."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from rankfold.data.reading.rows import read_rows
from rankfold.data.shapes.convert import to_examples
from rankfold.data.tokens.encode import encode_all

FOLDER = Path(str(files("rankfold.data"))) / "cold_jokes"


@pytest.fixture(scope="module")
def rows():
    return {name: [row.values for row in read_rows(FOLDER / f"{name}.jsonl")] for name in ("train", "test")}


def test_there_are_enough_jokes_in_both_languages(rows):
    languages = Counter(row["language"] for name in rows for row in rows[name])
    assert languages["en"] >= 200
    assert languages["zh"] >= 60
    assert Counter(row["language"] for row in rows["test"]).keys() == {"en", "zh"}


def test_no_joke_and_no_topic_is_in_both_files_or_twice(rows):
    both = [*rows["train"], *rows["test"]]
    for column in ("prompt", "completion"):
        texts = [" ".join(row[column].lower().split()) for row in both]
        assert len(set(texts)) == len(texts)


def test_a_joke_says_what_its_language_is(rows):
    for row in (*rows["train"], *rows["test"]):
        chinese = any("\u4e00" <= char <= "\u9fff" for char in row["completion"])
        assert chinese == (row["language"] == "zh")


def test_every_joke_can_be_trained_on(real_base):
    for name in ("train", "test"):
        examples, style, _ = to_examples(read_rows(FOLDER / f"{name}.jsonl"))
        encoded, too_long = encode_all(examples, real_base.tokenizer, 256)
        assert (style, too_long) == ("chat", [])
        assert all(row.trained_tokens > 5 for row in encoded)
