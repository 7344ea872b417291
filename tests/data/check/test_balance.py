from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.check.balance import MOST_LABELS, Balance, language_of, summarise
from rankfold.data.shapes.example import Example, Message


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France, and how far is it from here?", "English"),
        ("Was ist die Hauptstadt von Frankreich und wie weit ist es?", "German"),
        ("Quelle est la capitale de la France et comment y aller avec vous ?", "French"),
        ("¿Cuál es la capital de Francia y cómo se llega con el tren?", "Spanish"),
        ("法国的首都是哪里？", "Chinese"),
        ("フランスの首都はどこですか？", "Japanese"),
        ("東京は日本の首都です", "Japanese"),
        ("프랑스의 수도는 어디입니까?", "Korean"),
        ("Какая столица Франции?", "Cyrillic"),
        ("ما هي عاصمة فرنسا؟", "Arabic"),
        ("फ्रांस की राजधानी क्या है?", "Devanagari"),
        ("Explain: 什么是机器学习中的过拟合现象以及如何避免它", "Chinese"),
        ("Helsinki Kuopio Tampere", "Latin, language unknown"),
        ("12 + 30 = 42", "no letters"),
        ("🙂🙂", "no letters"),
        ("", "no letters"),
    ],
)
def test_the_script_or_language_is_told(text, language):
    assert language_of(text) == language


@given(st.text(max_size=500))
def test_any_text_has_a_language_or_script(text):
    assert language_of(text)


def test_labels_are_counted_apart_up_to_a_bound():
    balance = Balance()
    for number in range(MOST_LABELS + 50):
        example = Example("f:1", (Message("user", ("x",)),), label=f"class {number}")
        balance.add(example, "English")
        balance.add(example, "German")
    assert len(balance.labels) == MOST_LABELS
    assert balance.labels.total() + balance.other_labels == 2 * (MOST_LABELS + 50)
    assert balance.languages == {"English": MOST_LABELS + 50, "German": MOST_LABELS + 50}


def test_feedback_counts_as_two_labels():
    balance = Balance()
    for good in (True, True, False):
        balance.add(Example("f:1", (Message("user", ("x",)),), desirable=good), "English")
    assert balance.labels == {"a good answer": 2, "a bad answer": 1}


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_the_lengths_are_those_that_numpy_finds_and_the_bars_hold_every_row(values):
    lengths = summarise(array("I", values), "tokens", None, None)
    assert (lengths.shortest, lengths.longest, lengths.total) == (min(values), max(values), sum(values))
    assert lengths.percentile_99 == np.percentile(values, 99, method="inverted_cdf")
    assert sum(rows for _, rows in lengths.bars) == len(values)
    ends = [end for end, _ in lengths.bars]
    assert ends == sorted(ends)
    assert ends[-1] >= max(values)
    assert sum(value <= lengths.cut for value in values) >= 0.99 * len(values)
    assert lengths.cut % 64 == 0


@pytest.mark.parametrize(
    ("most", "asked", "cut", "reason"),
    [
        (None, None, 128, "the 99th percentile (100), rounded up to a multiple of 64"),
        (90, None, 90, "the model's longest input; the 99th percentile is 100"),
        (8192, 50, 50, "as asked"),
    ],
)
def test_the_cut_says_where_it_comes_from(most, asked, cut, reason):
    lengths = summarise(array("I", [100] * 99 + [4000]), "tokens", most, asked)
    assert (lengths.cut, lengths.reason) == (cut, reason)


def test_one_very_long_row_does_not_flatten_the_picture():
    lengths = summarise(array("I", [*range(10, 60)] * 100 + [4_000_000]), "characters", None, None)
    assert lengths.bars[-1] == (4_000_000, 1)
    assert lengths.bars[-2][0] < 100
