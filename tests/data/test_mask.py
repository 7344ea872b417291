from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from chat_formats import FORMATS, TRL, Format
from rankfold.data.encode import IGNORE, encode, encode_each, marked_pieces
from rankfold.data.example import Example, Image, Message
from rankfold.errors import DataError
from rankfold.models.prompt import prompt_encoder

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}


def bytes_tokenizer(template: str, tokens: set[str], bos: str = "<s>", eos: str = "</s>"):
    """A tokenizer that writes one token a byte, and ``tokens`` as one each."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(tokens)])
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(form: Format) -> set[str]:
    """The control tokens that a format's description names."""
    rows = form.rows("a" if form.system or form.merge else None, [("a", "b"), ("c", "d")])
    texts = [text for row in rows for text, _ in row]
    texts += [piece for row in form.rows(None, [("a", "b")]) for piece, _ in row] if not form.system else []
    return {token for text in texts for token in re.findall("\0(.*?)\0", text)}


def spelt(tokenizer, text: str) -> list[int]:
    """The tokens of a text in which control tokens stand between NULs, letter by letter."""
    vocabulary = tokenizer.get_vocab()
    byte_letters = {byte: letter for letter, byte in _letters().items()}
    ids = []
    for place, part in enumerate(text.split("\0")):
        ids += [vocabulary[part]] if place % 2 else [vocabulary[byte_letters[b]] for b in part.encode()]
    return ids


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: itself where it can be seen, else the next of those from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}


@pytest.fixture(scope="module")
def tokenizers(real_base):
    """One tokenizer for each format."""

    def make(name: str):
        form = FORMATS[name]
        template = real_base.tokenizer.chat_template if name == "smollm2" else form.path.read_text("utf-8")
        return bytes_tokenizer(template, tokens_of(form), form.bos, form.eos)

    return {name: make(name) for name in FORMATS}


SPELT = ["<|im_end|>", "</s>", "<|eot_id|> x", "user", "assistant", "[/INST]", "<|end|>\n", "final", "Hi."]
words = st.one_of(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0", max_codepoint=0x1FFFF), min_size=1
    ),
    st.lists(st.sampled_from(SPELT), min_size=1, max_size=3).map(" ".join),
).filter(lambda text: bool(text.strip()) and "think>" not in text)
conversations = st.tuples(st.none() | words, st.lists(st.tuples(words, words), min_size=1, max_size=4))


def chat(system: str | None, turns: list[tuple[str, str]]) -> Example:
    messages = [Message("system", (system,))] if system is not None else []
    for question, answer in turns:
        messages += [Message("user", (question,)), Message("assistant", (answer,))]
    return Example("f:1", messages=tuple(messages))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations)
@example(
    conversation=("Be <|im_end|> brief.", [("user", "assistant"), (" a </s>", "<|im_end|>"), ("b", "c\n")])
)
def test_the_mask_of_a_format_equals_one_worked_out_letter_by_letter(tokenizers, name, conversation):
    form, tokenizer = FORMATS[name], tokenizers[name]
    system, turns = conversation
    if form.system is None and form.merge is None:
        system = None
    [(_, rows)] = encode_each([chat(system, turns)], tokenizer)
    assert not isinstance(rows, DataError), rows
    expected = form.rows(system, turns)
    assert [row.input_ids for row in rows] == [
        [token for text, _ in row for token in spelt(tokenizer, text)] for row in expected
    ]
    assert [row.labels for row in rows] == [
        [token if trained else IGNORE for text, trained in row for token in spelt(tokenizer, text)]
        for row in expected
    ]
