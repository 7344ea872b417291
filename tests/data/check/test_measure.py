from __future__ import annotations

import random
from dataclasses import replace

import pytest

from rankfold.data.check import measure
from rankfold.data.check.measure import CharacterMeter, TokenMeter, token_counts
from rankfold.data.shapes.example import Example, Message
from rankfold.data.tokens.encode import encode
from rankfold.errors import DataError

TEXT = "Alpha beta, gamma; delta: 12 (epsilon) don't zeta! 34.5 eta theta_iota\nkappa"
WORDS = TEXT.split(" ")


def chat(draw: random.Random, number: int) -> Example:
    """A conversation of one to three questions, with a system turn or without."""
    turns = [Message("system", (" ".join(draw.choices(WORDS, k=4)),))] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        turns.append(Message("user", (" ".join(draw.choices(WORDS, k=draw.randint(1, 30))),)))
        turns.append(Message("assistant", (" ".join(draw.choices(WORDS, k=draw.randint(1, 30))),)))
    return Example(f"f:{number}", tuple(turns))


def measured(tokenizer, examples: list[Example]) -> dict[int, int]:
    meter = TokenMeter(tokenizer)
    for row, example in enumerate(examples):
        meter.add(row, example)
    meter.finish()
    assert not meter.measured.refused
    return dict(zip(meter.measured.rows, meter.measured.lengths, strict=True))


@pytest.mark.parametrize("exact_rows", [10_000, 30])
def test_token_counts_are_those_of_training(real_base, monkeypatch, exact_rows):
    monkeypatch.setattr(measure, "EXACT_ROWS", exact_rows)
    monkeypatch.setattr(measure, "BATCH_ROWS", 30)
    draw = random.Random(0)
    examples = [chat(draw, number) for number in range(150)]
    found = measured(real_base.tokenizer, examples)
    wanted = {row: len(encode(example, real_base.tokenizer)) for row, example in enumerate(examples)}
    assert found == wanted


def test_running_text_counts_as_in_training(real_base, monkeypatch):
    monkeypatch.setattr(measure, "EXACT_ROWS", 5)
    monkeypatch.setattr(measure, "BATCH_ROWS", 5)
    examples = [Example(f"f:{n}", text=" ".join(WORDS[: n % 9 + 1])) for n in range(25)]
    found = measured(real_base.tokenizer, examples)
    assert found == {row: len(encode(example, real_base.tokenizer)) for row, example in enumerate(examples)}


def test_a_row_that_cannot_be_encoded_is_refused_with_the_reason_also_late(real_base, monkeypatch):
    monkeypatch.setattr(measure, "EXACT_ROWS", 2)
    monkeypatch.setattr(measure, "BATCH_ROWS", 2)
    draw = random.Random(0)
    examples = [chat(draw, number) for number in range(10)]
    turns = (Message("user", ("what about this",), train=True), Message("assistant", ("no",)))
    examples[7] = replace(examples[7], messages=turns)
    with pytest.raises(DataError) as wanted:
        encode(examples[7], real_base.tokenizer)
    meter = TokenMeter(real_base.tokenizer)
    for row, example in enumerate(examples):
        meter.add(row, example)
    meter.finish()
    assert meter.measured.refused == [(7, str(wanted.value))]
    assert sorted(meter.measured.rows) == [row for row in range(10) if row != 7]


def test_trained_tokens_are_counted_over_all_rows(real_base, monkeypatch):
    monkeypatch.setattr(measure, "EXACT_ROWS", 20)
    monkeypatch.setattr(measure, "BATCH_ROWS", 20)
    draw = random.Random(0)
    examples = [chat(draw, number) for number in range(100)]
    meter = TokenMeter(real_base.tokenizer)
    for row, example in enumerate(examples):
        meter.add(row, example)
    meter.finish()
    assert meter.measured.trained == sum(encode(e, real_base.tokenizer).trained_tokens for e in examples)


def test_characters_are_those_of_the_words_and_the_longer_answer_counts():
    question, answer = Message("user", ("123",)), Message("assistant", ("45",))
    pair = Example("f:1", (question, answer), rejected=(Message("assistant", ("67890",)),))
    meter = CharacterMeter()
    for row, example in enumerate([Example("f:0", (question, answer)), pair, Example("f:2", text="1234567")]):
        meter.add(row, example)
    meter.finish()
    assert list(meter.measured.lengths) == [5, 8, 7]


def test_a_batch_of_texts_is_counted_as_each_by_itself(real_base):
    texts = ["", "a", "Hello, world", "你好", "x" * 500]
    single = [len(real_base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert token_counts(real_base.tokenizer, texts) == single
