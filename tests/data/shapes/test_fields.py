from __future__ import annotations

import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.reading.row import WrittenNumber
from rankfold.data.shapes.fields import check_text, described, objects_of, one_of, parsed, text_of, truth_of


@given(st.text())
def test_text_is_refused_exactly_if_it_cannot_be_encoded_or_holds_nul(text):
    bad = "\0" in text or any("\ud800" <= char <= "\udfff" for char in text)
    if not bad:
        assert text_of({"a": text}, "a") == text
        return
    with pytest.raises(ValueError, match="'a' holds (a NUL character|half of a surrogate pair)"):
        check_text(text, "a")


@given(st.text(max_size=3).map(lambda text: text + "\0é") | st.sampled_from(["\ud800", "a\udfffb", "\0"]))
def test_nul_and_half_surrogates_are_refused(text):
    with pytest.raises(ValueError, match="'a' holds"):
        text_of({"a": text}, "a")


def test_nothing_and_null_are_no_text_and_other_types_are_refused():
    assert text_of({}, "a") is text_of({"a": None}, "a") is None
    assert text_of({"a": float("nan")}, "a") is None
    with pytest.raises(ValueError, match="'a' must be text, got list"):
        text_of({"a": ["b"]}, "a")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.1, "0.1"),
        (WrittenNumber("0.10"), "0.10"),
        (False, "false"),
        (Decimal("1.50"), "1.50"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 9), "2024-05-01T09:00:00"),
        (datetime.timedelta(hours=2), "2:00:00"),
    ],
)
def test_what_is_no_text_is_spelt_as_a_file_shows_it(value, text):
    assert text_of({"a": value}, "a") == text


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", "1"])
def test_true_is_understood_as_tables_spell_it(value):
    assert truth_of({"a": value}, "a") is True


@pytest.mark.parametrize("value", [None, "yes", 2, 0.5, [], ""])
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(ValueError, match="'a' must be true or false"):
        truth_of({"a": value}, "a")


def test_objects_are_read_from_lists_and_from_json_text():
    assert objects_of({"a": [{"b": 1}]}, "a") == objects_of({"a": ' [{"b": 1}]'}, "a") == [{"b": 1}]
    assert objects_of({"a": None}, "a") == objects_of({"a": " "}, "a") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "must be a list of objects, got str"),
        ([1, "a"], "must be a list of objects, got a list of int, str"),
        ({}, "must be a list of objects, got dict"),
        ("[{'b': 1}]", "is not the JSON that belongs there"),
    ],
)
def test_what_is_no_list_of_objects_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        objects_of({"a": value}, "a")


def test_small_things():
    assert one_of({"a": None, "b": 0}, ("a", "b")) == 0
    assert one_of({}, ("a",)) is None
    assert parsed("[1]", "a") == [1]
    with pytest.raises(ValueError, match="'a' is not the JSON"):
        parsed("[" * 100_000, "a")
    assert (described([]), described([1]), described({})) == ("an empty list", "a list of int", "dict")
