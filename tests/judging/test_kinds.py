from __future__ import annotations

import pytest

from conftest import GSM8K, needs_gsm8k
from rankfold.data.shapes.sources import Source, read_examples
from rankfold.judging.kinds import kind_of, labels_of


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (["yes", "no"] * 10, "labels"),
        ([f"intent {n % 30}" for n in range(90)], "labels"),
        ([str(1 + n % 5) for n in range(50)], "labels"),
        ([str(n * 3) for n in range(50)], "numbers"),
        ([f"So {n} and {n}. #### {n}" for n in range(40)], "numbers"),
        ([f"{n} km" for n in range(40)], "numbers"),
        ([f'{{"name": "n{n}"}}' for n in range(20)], "json"),
        ([f"```json\n[{n}]\n```" for n in range(20)], "json"),
        ([f"Town of {chr(65 + n)}ville" for n in range(20)], "short"),
        ([f"A long answer about {'many ' * 20} things, number {n} of them." for n in range(20)], "words"),
        (["the same"] * 20, "short"),
        (["one answer alone"], "short"),
        (["", "", ""], "short"),
    ],
)
def test_the_kind_of_answers_is_seen_from_them(wanted, kind):
    assert kind_of(wanted).name == kind


@needs_gsm8k
def test_gsm8k_wants_numbers():
    wanted = [example.answer for example in read_examples([Source(str(GSM8K))]).examples]
    assert kind_of(wanted).name == "numbers"


def test_jokes_are_words(joke_rows):
    wanted = [f"{row['completion']} And more words were said, so many." for row in joke_rows]
    assert kind_of(wanted).name == "words"


def test_a_label_is_spelt_as_it_is_most_often():
    assert labels_of(["Yes", "yes", "Yes.", "Yes", "no"]) == ("Yes", "no")
