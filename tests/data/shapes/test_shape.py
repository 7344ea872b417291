from __future__ import annotations

import pytest

from rankfold.data.shapes.example import Example
from rankfold.data.shapes.shape import Shape, with_paths

SHAPE = Shape(
    "two",
    "a shape of two fields",
    {"first": ("a", "b"), "second": ("b", "c")},
    lambda row, columns: Example(row.origin, text="x"),
    {"third": ("d",)},
)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("ab", {"first": "a", "second": "b"}),
        ("bac", {"first": "a", "second": "b"}),
        ("bc", {"first": "b", "second": "c"}),
        ("acd", {"first": "a", "second": "c", "third": "d"}),
    ],
)
def test_columns_are_bound_by_the_first_name_that_is_free(names, columns):
    assert SHAPE.bound(names).columns == columns


def test_one_column_never_serves_two_fields():
    assert SHAPE.bound("b") is SHAPE.bound("a") is SHAPE.bound("d") is None
    assert SHAPE.missing("b") == []
    assert SHAPE.missing("ad") == ["second"]


def test_a_row_whose_columns_are_all_null_does_not_fit():
    bound = SHAPE.bound("ac")
    assert bound.fits({"a": None, "c": 1})
    assert not bound.fits({"a": None, "c": None})
    assert bound.reason == "columns a, c"


def test_a_column_that_the_user_named_must_be_there():
    with pytest.raises(ValueError, match=r"no column 'c' \(did you mean 'cc'\?\); the row has \['a', 'cc'\]"):
        with_paths({"a": 1, "cc": 2}, SHAPE.bound("ac"))
