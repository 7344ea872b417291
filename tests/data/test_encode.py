from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankfold.data.encode import IGNORE, encode, encode_all, marked_pieces
from rankfold.data.example import Example, Message
from rankfold.errors import DataError, ModelError

words = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), min_size=1).filter(
    lambda text: bool(text.strip()) and "<|" not in text
)
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer(real_base):
    return real_base.tokenizer


def chat(*contents: str, system: str | None = None) -> Example:
    roles = ("user", "assistant")
    turns = [Message(roles[place % 2], (text,)) for place, text in enumerate(contents)]
    head = [Message("system", (system,))] if system else []
    return Example("f.jsonl:1", messages=(*head, *turns))


def test_the_assistants_words_and_their_end_are_trained_and_nothing_else(tokenizer):
    row = encode(chat("Hi", "Yo", "Bye", "See you"), tokenizer)
    assert marked_pieces(row, tokenizer) == [
        (f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yo<|im_end|>", True),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        ("See you<|im_end|>", True),
    ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), st.booleans())
def test_the_mask_equals_one_worked_out_by_hand(tokenizer, contents, own_system):
    system = "Be brief." if own_system else None
    try:
        row = encode(chat(*contents, system=system), tokenizer)
    except DataError as error:
        assume("cannot spell" not in str(error))
        raise
    expected = [(f"<|im_start|>system\n{system}<|im_end|>\n" if system else SYSTEM, False)]
    for place, text in enumerate(contents):
        if place % 2 == 0:
            head = "\n" if place else ""
            expected.append((f"{head}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False))
        else:
            expected.append((f"{text}<|im_end|>", True))
    first = expected.pop(0)[0]
    expected[0] = (first + expected[0][0], False)
    assert marked_pieces(row, tokenizer) == expected


def test_the_prompts_tokens_are_those_the_model_sees_when_asked(tokenizer):
    example = chat("Tell me a joke.", "\nNo.")
    row = encode(example, tokenizer)
    asked = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert row.input_ids[: len(asked)] == asked
    assert set(row.labels[: len(asked)]) == {IGNORE}


def test_running_text_is_trained_from_its_second_token_to_its_end(tokenizer):
    row = encode(Example("f:1", text="A cold joke."), tokenizer)
    assert row.input_ids == [*tokenizer("A cold joke.")["input_ids"], tokenizer.eos_token_id]
    assert row.labels == [IGNORE, *row.input_ids[1:]]
    assert row.trained_tokens == len(row) - 1


@pytest.mark.parametrize(
    "example", [chat("a <|im_end|> b", "c"), chat("a", "<|im_start|>"), Example("f", text="<|endoftext|>")]
)
def test_text_that_spells_a_control_token_is_refused(tokenizer, example):
    with pytest.raises(DataError, match=r"spells control tokens of this model: <\|"):
        encode(example, tokenizer)


def test_a_character_that_the_vocabulary_lacks_is_refused_by_name(tokenizer):
    with pytest.raises(DataError, match=r"vocabulary cannot spell: '\\U00040000'"):
        encode(chat("a", "b \U00040000 c"), tokenizer)


def with_template(tokenizer, template: str | None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_model_without_a_template_is_refused(tokenizer):
    with pytest.raises(ModelError, match="no chat template"):
        encode(chat("a", "b"), with_template(tokenizer, None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}",
            "without a stop token",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
            "changes the assistant's words",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "rewrites earlier turns",
        ),
    ],
)
def test_a_template_that_hides_what_is_trained_is_refused(tokenizer, template, message):
    with pytest.raises(DataError, match=message):
        encode(chat("a", "b", "c", "d"), with_template(tokenizer, template))


def test_rows_over_the_length_are_left_out_and_named(tokenizer):
    rows, left_out = encode_all([chat("a", "b"), chat("a", "b " * 200)], tokenizer, max_length=64)
    assert len(rows) == 1
    assert left_out == ["f.jsonl:1 has 233 tokens, more than 64"]


def test_all_rows_over_the_length_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"every row is too long; raise --max-length"):
        encode_all([chat("a", "b " * 200)], tokenizer, max_length=64)


def test_every_row_that_cannot_be_encoded_is_named(tokenizer):
    bad = [Example(f"f:{line}", text="<|im_end|>") for line in (1, 2)]
    with pytest.raises(DataError, match=r"2 rows cannot be encoded(.|\n)*f:1(.|\n)*f:2"):
        encode_all(bad, tokenizer, 64)
