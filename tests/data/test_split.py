from __future__ import annotations

import pytest

from rankfold.data.example import Example
from rankfold.data.split import fingerprint, split_held_out, without_leaks
from rankfold.errors import DataError


def texts(*values: str) -> list[Example]:
    return [Example(f"f:{line}", text=value) for line, value in enumerate(values, start=1)]


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (20, 1), (100, 5), (5000, 200)])
def test_five_percent_at_least_one_and_at_most_200_are_held_out(rows, held_out):
    train, held = split_held_out(texts(*(f"joke {n}" for n in range(rows))))
    assert (len(train), len(held)) == (rows - held_out, held_out)
    assert not {fingerprint(e) for e in train} & {fingerprint(e) for e in held}


def test_copies_of_a_held_out_row_are_not_trained_on():
    train, held = split_held_out(texts(*["same"] * 15, *["other"] * 15))
    assert len({e.text for e in train} | {e.text for e in held}) == 2
    assert not {e.text for e in train} & {e.text for e in held}


def test_the_split_does_not_depend_on_where_rows_stand():
    rows = texts(*(f"joke {n}" for n in range(100)))
    assert {e.text for e in split_held_out(rows)[1]} == {e.text for e in split_held_out(rows[::-1])[1]}


def test_rows_that_are_all_the_same_cannot_be_split():
    with pytest.raises(DataError, match="all rows are the same"):
        split_held_out(texts("a", "a"))


def test_leaks_are_taken_out_and_named():
    train, leaked = without_leaks(texts("a", "b", "c"), texts("x", "b"))
    assert ([e.text for e in train], leaked) == (["a", "c"], ["f:2"])
    with pytest.raises(DataError, match="nothing is left"):
        without_leaks(texts("a"), texts("a"))
