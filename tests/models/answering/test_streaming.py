"""What is streamed is what is decoded, for every kind of tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "engines"))

import reference

from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.answering.streaming import TextStream, decoded, stop_place, words
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.tokenizer import gguf_tokenizer
from rankfold.models.messages.prompt import prompt_encoder

TEXTS = [
    "def f(x):\n    return x + 1\n\n\nfor i in range(3):\n\tprint(i)\n",
    "é 你好 🙂👩‍👩‍👧 ok ,  fine .  n't \ufffd end",
    *reference.strings(40),
]


@pytest.fixture(scope="module", params=["bytes", "pieces", "pieces-without-space", "words"])
def tokenizer(request, tmp_path_factory):
    if request.param != "words":
        name = "smollm" if request.param == "bytes" else request.param
        return gguf_tokenizer(
            read_gguf(reference.write_words(tmp_path_factory.mktemp("words"), f"{name}.vocab.gguf"))
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "un": 1, "##do": 2, "##s": 3, ",": 4, "n": 5, "'": 6, "t": 7, ".": 8}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


def streamed(tokenizer, ids: list[int], stops=()) -> str:
    shown: list[str] = []
    stream = TextStream(tokenizer, shown.append, stops)
    for place in range(1, len(ids) + 1):
        stream.put(ids[:place])
        if stop_place(words(tokenizer, ids[:place]), stops) is not None:
            break
    stream.end(ids[:place] if ids else [])
    return "".join(shown)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_is_streamed_as_it_is_decoded(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in {len(ids), len(ids) // 2, max(len(ids) - 1, 0)}:
        assert streamed(tokenizer, ids[:cut]) == decoded(tokenizer, ids[:cut])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_are_streamed_as_they_are_decoded(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    assert streamed(tokenizer, ids) == decoded(tokenizer, ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stop_text_is_no_part_of_what_is_shown(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=24))
    text = words(tokenizer, ids)
    begin = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[begin : begin + data.draw(st.integers(1, 6))] or "x"
    stops = (stop, "never there")
    shown = streamed(tokenizer, ids, stops)
    ended = next(
        (place for place in range(1, len(ids) + 1) if stop in words(tokenizer, ids[:place])), len(ids)
    )
    assert shown == decoded(tokenizer, ids[:ended], stops)
    assert stop not in shown


def test_a_piece_is_shown_as_soon_as_its_last_byte_is_there(tokenizer):
    ids = tokenizer("ab cd ef", add_special_tokens=False)["input_ids"]
    shown: list[str] = []
    stream = TextStream(tokenizer, shown.append)
    for place in range(1, len(ids) + 1):
        stream.put(ids[:place])
        assert "".join(shown) == decoded(tokenizer, ids[:place])


def test_the_real_models_answer_is_streamed_as_it_is_returned(real_base):
    shown: list[str] = []
    ask = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
    assert prompt_encoder(real_base.tokenizer).prompt_ids(ask)
    answer = reply(real_base, ask, Sampling(max_new_tokens=60, temperature=0), shown.append)
    assert "".join(shown) == answer
    assert len(shown) > 30
    assert "\n    " in answer


@pytest.mark.parametrize("text", [" Paris is  here \n", "x", " ", "\n\na \U0001f600 b "])
def test_white_space_stays_where_an_answer_is_wanted_verbatim(real_base, text):
    tokenizer, shown = real_base.tokenizer, []
    stream = TextStream(tokenizer, shown.append, verbatim=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for count in range(1, len(ids) + 1):
        stream.put(ids[:count])
    stream.end(ids)
    assert "".join(shown) == text == decoded(tokenizer, ids, verbatim=True)
    assert decoded(tokenizer, ids) == text.strip()
