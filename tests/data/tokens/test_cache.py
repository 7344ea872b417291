from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.shapes.example import Example
from rankfold.data.tokens import cache
from rankfold.data.tokens.cache import (
    CachedRows,
    encode_cached,
    encoding_marks,
    entry_key,
    lengths_of,
    trained_counts,
)
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.data.tokens.rows_hash import rows_hash

tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9)
counts = st.sampled_from([None, None, 0.5, 0.1, 3.0])  # of the last token of a row
weighted = st.tuples(tokens, counts)
contents = st.tuples(st.lists(weighted, min_size=1, max_size=9), st.lists(st.text(), max_size=3))


def weights(length: int, last: float | None) -> list[float] | None:
    return None if last is None else [1.0] * (length - 1) + np.float32([last]).tolist()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache that keeps even a single row."""
    monkeypatch.setenv("RANKFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LEAST_ROWS", 1)
    return tmp_path / "tokens"


class Encoding:
    """Gives rows, and counts how often it was asked."""

    reader = None
    over: ClassVar = ["f:9 has 5,000 tokens"]

    def __init__(self, *lengths: int) -> None:
        self.asked = 0
        self.rows = [
            EncodedRow(f"f:{n}", list(range(n, n + length)), [IGNORE, *range(n + 1, n + length)])
            for n, length in enumerate(lengths)
        ]

    def __iter__(self):
        self.asked += 1
        return iter(self.rows)


def examples(*contents: str) -> list[Example]:
    return [Example(f"f:{line}", text=content) for line, content in enumerate(contents)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents)
def test_what_is_kept_is_what_was_encoded(content):
    lists, left_out = content
    rows = [
        EncodedRow(
            f"{n}\ud800☃",
            [i for i, _ in ids],
            [i if trained else IGNORE for i, trained in ids],
            weights=weights(len(ids), last),
        )
        for n, (ids, last) in enumerate(lists)
    ]
    marks = {"test": repr(content)}
    for _ in range(2):
        given = Encoding()
        given.rows, given.over = rows, left_out
        got, got_left_out = encode_cached(given, examples("a"), marks)
        assert isinstance(got, CachedRows)
        assert (list(got), got_left_out) == (rows, left_out)
        assert got[-1] == rows[-1]
        assert got[1:] == rows[1:]
        assert rows_hash(got) == rows_hash(rows)
        with pytest.raises(IndexError):
            _ = got[len(rows)]


def test_the_same_rows_are_encoded_once():
    encoding = Encoding(3, 5)
    results = [encode_cached(encoding, examples("a", "b"), {"model": 1}) for _ in range(3)]
    assert encoding.asked == 1
    assert [list(rows) for rows, _ in results] == [encoding.rows] * 3


def test_other_rows_or_other_marks_are_encoded_anew():
    encoding = Encoding(3)
    encode_cached(encoding, examples("a"), {"max_length": 8})
    encode_cached(encoding, examples("b"), {"max_length": 8})
    encode_cached(encoding, examples("a"), {"max_length": 9})
    encode_cached(encoding, [Example("g:0", text="a")], {"max_length": 8})
    assert encoding.asked == 4


def test_few_rows_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(cache, "LEAST_ROWS", 2)
    encode_cached(Encoding(3), examples("a"), {})
    assert not folder.exists()


def damage_a_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*cache.ARRAYS, "facts.json", "sha256"])
@pytest.mark.parametrize("harm", [damage_a_byte, os.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_entry_is_noticed_and_made_anew(folder, name, harm):
    encoding = Encoding(3, 5)
    encoding.rows[1] = replace(encoding.rows[1], weights=weights(5, 0.5))
    encode_cached(encoding, examples("a"), {})
    [entry] = folder.iterdir()
    harm(entry / name)
    for asked in (2, 2):
        rows, _ = encode_cached(encoding, examples("a"), {})
        assert list(rows) == encoding.rows
        assert encoding.asked == asked


def test_some_rows_of_an_entry_are_those_rows(folder):
    encoding = Encoding(3, 5, 2, 9)
    rows, _ = encode_cached(encoding, examples("a"), {})
    short = rows.up_to(4)
    assert list(short) == [encoding.rows[0], encoding.rows[2]]
    assert list(lengths_of(short)) == [3, 2]
    assert list(lengths_of(rows)) == list(lengths_of(encoding.rows)) == [3, 5, 2, 9]
    assert rows_hash(short) == rows_hash(list(short))
    assert trained_counts(rows, [2, 4]) == trained_counts(encoding.rows, [2, 4]) == (15, {2: 2, 4: 2})


def test_an_encoding_that_fails_leaves_nothing_behind(folder):
    class Failing(Encoding):
        def __iter__(self):
            yield self.rows[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_cached(Failing(3), examples("a"), {})
    assert not folder.exists() or not list(folder.iterdir())


def test_a_place_that_cannot_be_written_costs_only_time(folder):
    folder.write_text("a file where the folder should be")
    encoding = Encoding(3)
    for _ in range(2):
        assert encode_cached(encoding, examples("a"), {})[0] == encoding.rows
    assert encoding.asked == 2


def test_entries_not_used_for_longest_make_room(folder, monkeypatch):
    for number, content in enumerate("abc"):
        encode_cached(Encoding(100), examples(content), {})
        os.utime(folder / entry_key(examples(content), {}), (number, number))
    size = sum(file.stat().st_size for file in next(folder.iterdir()).iterdir())
    encode_cached(Encoding(100), examples("a"), {})  # used again: "b" is the oldest now
    monkeypatch.setattr(cache, "CACHE_BYTES", 3 * size + size // 2)
    encode_cached(Encoding(100), examples("d"), {})
    assert {entry.name for entry in folder.iterdir()} == {entry_key(examples(c), {}) for c in "acd"}


def test_the_marks_change_with_tokenizer_template_and_options(real_base):
    tokenizer = real_base.tokenizer
    other_template, other_stop = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    other_template.chat_template += " "
    other_stop.eos_token = "<|endoftext|>"
    marks = [
        encoding_marks(tokenizer, max_length=8),
        encoding_marks(copy.deepcopy(tokenizer), max_length=8),
        encoding_marks(tokenizer, max_length=9),
        encoding_marks(other_template, max_length=8),
        encoding_marks(other_stop, max_length=8),
    ]
    keys = [entry_key(examples("a"), mark) for mark in marks]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
