from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankfold.data.shapes.example import Example, Message
from rankfold.data.tokens.encode import IGNORE, encode, encode_all, encode_each, marked_pieces
from rankfold.errors import DataError

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


def test_each_token_of_an_answer_counts_what_its_turn_says(tokenizer):
    plain = chat("Hi", "Yo", "Bye", "See you", system="Be brief.")
    counts = (1.0, 1.0, 0.25, 1.0, 2.0)
    turns = [replace(turn, weight=weight) for turn, weight in zip(plain.messages, counts, strict=True)]
    row, alike = encode(replace(plain, messages=tuple(turns)), tokenizer), encode(plain, tokenizer)
    assert (row.input_ids, row.labels, alike.weights) == (alike.input_ids, alike.labels, None)
    trained = [w for w, label in zip(row.weights, row.labels, strict=True) if label != IGNORE]
    answers = [len(tokenizer(f"{text}<|im_end|>").input_ids) for text in ("Yo", "See you")]
    assert trained == [0.25] * answers[0] + [2.0] * answers[1]
    assert row.weight == pytest.approx(0.25 * answers[0] + 2.0 * answers[1])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), st.booleans())
def test_the_mask_equals_one_worked_out_by_hand(tokenizer, contents, own_system):
    system = "Be brief." if own_system else None
    [(_, rows)] = encode_each([chat(*contents, system=system)], tokenizer)
    assume(not any(reason in str(rows) for reason in ("cannot spell", "U+FDD0")))
    written = f"<|im_start|>system\n{system}<|im_end|>\n" if own_system else SYSTEM
    texts = []
    for question, answer in zip(contents[::2], contents[1::2], strict=True):
        written += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        texts.append(written)
        written += "\n"
    pieces = [marked_pieces(row, tokenizer) for row in rows]
    assert [text for row in pieces for text, trained in row if trained] == [
        f"{answer}<|im_end|>" for answer in contents[1::2]
    ]
    assert "".join(text for text, _ in pieces[-1]) == texts[-1]
    # A reply that begins with a line break joins the prompt's when it is read again: then a row ends there.
    assert all("".join(text for text, _ in row) in texts for row in pieces)
    assert len(rows) == 1 or any(answer[0].isspace() for answer in contents[1::2])


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
    "example", [chat("a <|im_end|> b", "c"), chat("a", "<|im_start|>"), Example("f", text="x<|endoftext|>y")]
)
def test_text_that_spells_a_control_token_is_encoded_as_text(tokenizer, example):
    row = encode(example, tokenizer)
    text = "".join(text for text, _ in marked_pieces(row, tokenizer))
    assert all(message.text in text for message in example.messages)
    assert example.text in text
    usual = encode(chat("a", "b") if example.messages else Example("f", text="xy"), tokenizer)
    control = [[token for token in ids if token < 17] for ids in (row.input_ids, usual.input_ids)]
    assert control[0] == control[1]


def test_a_text_that_ends_with_the_spelt_stop_token_gets_the_real_one_after_it(tokenizer):
    row = encode(Example("f", text="x<|im_end|>"), tokenizer)
    assert row.input_ids.count(tokenizer.eos_token_id) == 1
    assert row.labels[-1] == tokenizer.eos_token_id


def test_running_text_needs_a_token_to_stop_with(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encode(Example("f", text="x"), endless)


def test_a_character_that_the_vocabulary_lacks_is_refused_by_name(tokenizer):
    with pytest.raises(DataError, match=r"vocabulary cannot spell: '\\U00040000'"):
        encode(chat("a", "b \U00040000 c"), tokenizer)


def with_template(tokenizer, template: str | None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_model_without_a_template_is_trained_in_the_plain_one(tokenizer):
    bare = with_template(tokenizer, None)
    assert marked_pieces(encode(chat("a", "b", "c", "d"), bare), bare) == [
        ("<|im_start|>### User:\na\n\n### Assistant:\n", False),
        ("b<|im_end|>", True),
        ("\n\n### User:\nc\n\n### Assistant:\n", False),
        ("d<|im_end|>", True),
    ]


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
            "opens a reply with .* but writes one down with",
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
    bad = [Example(f"f:{line}", text="\U00040000") for line in (1, 2)]
    with pytest.raises(DataError, match=r"2 rows cannot be encoded(.|\n)*f:1(.|\n)*f:2"):
        encode_all(bad, tokenizer, 64)


def test_rows_come_in_order_whatever_shape_they_have_and_however_many_there_are(tokenizer):
    examples = [chat("a", str(n)) if n % 3 else Example(f"f:{n}", text=str(n)) for n in range(600)]
    for n, (example, rows) in enumerate(encode_each(examples, tokenizer)):
        assert example is examples[n]
        assert [row.input_ids[-2] for row in rows] == [tokenizer(str(n))["input_ids"][-1]]


def test_a_prompt_that_is_tokenised_otherwise_once_it_is_answered_begins_another_row(tokenizer):
    # "\n" and "\n" are one token at the end of a prompt and two before a word.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n\\n' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
    )
    changed = with_template(tokenizer, template)
    [(example, rows)] = encode_each([chat("a", "b", "c", "d")], changed)
    assert len(rows) == 2
    for row, count in zip(rows, (1, 3), strict=True):
        asked = [message.for_template() for message in example.messages[:count]]
        prompt = changed.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.trained_tokens == 2
