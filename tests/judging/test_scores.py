"""What an answer is worth beside the one wanted, by hand-made cases and by the libraries that others use."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.judging.scores import (
    SCORES,
    by_pattern,
    chrf,
    exact,
    f1,
    json_fields,
    json_valid,
    number,
    rouge_l,
)

TEXTS = st.text(max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_every_score_lies_between_0_and_1(answer, wanted):
    for score in SCORES.values():
        assert 0 <= score(answer, wanted) <= 1


@settings(deadline=None)
@given(TEXTS)
def test_an_answer_is_exactly_itself(text):
    assert exact(text, text) == f1(text, text) == 1


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        (" Yes. ", "yes", 1),
        ("ＹＥＳ！", "Yes", 1),
        ("yes\n\nindeed", "Yes indeed", 1),
        ("no", "yes", 0),
        ("“好的。”", "好的", 1),
        ("3.5", "35", 0),
    ],
)
def test_exact_match_passes_over_case_width_spaces_and_marks_at_the_ends(answer, wanted, expected):
    assert exact(answer, wanted) == expected


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("So it is 42.", "6 * 7 = <<6*7=42>>42\n#### 42", 1),
        ("#### 1,234", "1234", 1),
        ("$1234.00 in all", "1,234", 1),
        ("First 7, then 8", "#### 7", 0),
        ("It is #### 7 (not 8 apples)", "#### 8", 1),
        ("minus −5", "-5", 1),
        ("no number", "0", 0),
        ("", "0", 0),
        (".5", "0.50", 1),
        ("７", "7", 1),
    ],
)
def test_the_last_number_counts(answer, wanted, expected):
    assert number(answer, wanted) == expected


def test_f1_is_that_of_squad():
    """Rajpurkar's script: 2 * precision * recall / (precision + recall) on words without articles."""
    assert f1("the cat sat", "a cat sat down") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("", "word") == 0
    assert f1("北京大学", "北京") == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_rouge_l_is_rouge_scores_own_where_that_reads_the_letters():
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"])
    for answer, wanted in [
        ("the cat sat on the mat", "a cat lay on a mat"),
        ("one", "two"),
        ("x y z", "z y x"),
    ]:
        assert rouge_l(answer, wanted) == pytest.approx(theirs.score(wanted, answer)["rougeL"].fmeasure)


def test_rouge_l_reads_letters_that_rouge_score_drops():
    assert rouge_l("今天天气很好", "今天天气不好") == pytest.approx(5 / 6)
    assert rouge_l("Добрый день", "Добрый вечер") == pytest.approx(0.5)


def test_chrf_is_sacrebleus():
    from sacrebleu import sentence_chrf

    theirs = sentence_chrf("a cat sat", ["the cat sat"]).score
    assert chrf("a cat sat", "the cat sat") == pytest.approx(theirs / 100)


@settings(deadline=None)
@given(VALUES)
def test_json_has_all_its_own_fields_however_it_is_written(value):
    text = json.dumps(value)
    assert json_valid(text, "") == 1
    assert json_fields(json.dumps(value, indent=3, ensure_ascii=False), text) == 1
    assert json_fields(f"Here it is:\n```json\n{text}\n```", text) == (1 if "```" not in text else 0)


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1.0}', 1),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ('{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
        ("[1, 2]", "[2, 1]", 0),
        ('{"a": []}', '{"a": {}}', 0),
        ("{a: 1}", '{"a": 1}', 0),
        ("[" * 100_000, "[]", 0),
    ],
)
def test_fields_are_compared_with_their_paths(answer, wanted, expected):
    assert json_fields(answer, wanted) == pytest.approx(expected)


def test_a_pattern_compares_what_it_finds_last():
    score = by_pattern(re.compile(r"Answer: (\w+)"))
    assert score("Answer: a ... no, Answer: B", "Answer: b") == 1
    assert score("b", "Answer: b") == 0
    assert by_pattern(re.compile(r"\d+"))("1 2 3", "3") == 1
