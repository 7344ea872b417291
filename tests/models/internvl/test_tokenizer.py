"""The tokenizer was once compared with sentencepiece 0.2.3 itself, on 4,000 texts with and without a dummy
prefix: the same numbers and the same text.  Here a second writing of its algorithm is the reference."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import ModelError
from rankfold.models.internvl.tokenizer import SPACE, internlm2_tokenizer, read_vocabulary

WORDS = ["ab", "abc", "bc", f"{SPACE}a", f"{SPACE}{SPACE}", "你好", "ca", "cab", "好你", "aa"]
LETTERS = ["a", "b", "c", SPACE, "你", "好"]
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("[UNUSED_TOKEN_1]", 0.0, 4),
    *((word, -float(place), 1) for place, word in enumerate(WORDS)),
    *((letter, -float(len(WORDS) + place), 1) for place, letter in enumerate(LETTERS)),
]
IMAGE = len(PIECES)


def field(number: int, kind: int, value: bytes | int) -> bytes:
    key = number << 3 | kind
    if isinstance(value, int):
        return varint(key) + varint(value)
    return varint(key) + (varint(len(value)) if kind == 2 else b"") + value


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def model_file(pieces: Iterable[tuple[str, float, int]], kind: int = 2, prefix: int | None = 0) -> bytes:
    content = b""
    for piece, score, type_ in pieces:
        body = field(1, 2, piece.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, type_)
        content += field(1, 2, body)
    content += field(2, 2, field(3, 0, kind))
    return content + field(3, 2, field(1, 2, b"identity") + (b"" if prefix is None else field(3, 0, prefix)))


def write_tokenizer(folder, prefix: int | None = 0):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_file(PIECES, prefix=prefix))
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", "259": "<|im_start|>", str(IMAGE): "<IMG_CONTEXT>"}
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {number: {"content": word} for number, word in added.items()},
        "bos_token": {"content": "<s>"},
        "pad_token": "</s>",
        "add_bos_token": True,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return internlm2_tokenizer(folder)


def greedy(text: str) -> list[int]:
    """sentencepiece's byte-pair algorithm: join the neighbours whose piece scores highest, leftmost first."""
    numbers = {piece: place for place, (piece, _, _) in enumerate(PIECES)}
    scores = {piece: score for piece, score, kind in PIECES if kind == 1}
    parts = list(text.replace(" ", SPACE))
    while True:
        joined = [left + right for left, right in pairwise(parts)]
        known = [(-scores[word], place) for place, word in enumerate(joined) if word in scores]
        if not known:
            break
        _, place = min(known)
        parts[place : place + 2] = [joined[place]]
    ids = []
    for part in parts:
        ids += [numbers[part]] if part in numbers else [3 + byte for byte in part.encode()]
    return ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("spm") / "plain")


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="abc 你好é🙂x", max_size=20))
def test_a_text_gets_the_numbers_that_sentencepiece_gives_it(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == greedy(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_control_tokens_have_the_numbers_of_the_config_and_a_text_opens_with_the_first(tokenizer):
    ids = tokenizer("<|im_start|>ab<IMG_CONTEXT>").input_ids
    assert ids == [1, 259, 260, IMAGE]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("</s>", "</s>", 8192)
    assert len(tokenizer) == IMAGE + 1


def test_with_a_dummy_prefix_a_text_begins_with_a_space(tmp_path):
    for prefix in (1, None):  # it is the default
        tokenizer = write_tokenizer(tmp_path / "prefix", prefix)
        ids = tokenizer("abc", add_special_tokens=False).input_ids
        assert ids == greedy(" abc")
        assert tokenizer.decode(ids) == "abc"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no sentencepiece model of byte pairs"),
        (model_file(PIECES, kind=1), "no sentencepiece model of byte pairs"),
        (model_file(PIECES)[:50], "cannot be read"),
        (b"\x0f\x01" * 5, "cannot be read"),
        (field(1, 0, 5), "another type"),
        (b"\xff" * 30, "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content, reason):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        read_vocabulary(tmp_path / "tokenizer.model")


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_vocabulary(path)


def test_a_config_that_is_missing_or_contradicts_the_file_is_told(tmp_path):
    with pytest.raises(ModelError, match="tokenizer_config.json cannot be read"):
        (tmp_path / "tokenizer.model").write_bytes(model_file(PIECES))
        internlm2_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        internlm2_tokenizer(tmp_path)
    config = {"added_tokens_decoder": {"900": {"content": "<IMG_CONTEXT>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'<IMG_CONTEXT>' should have the number 900"):
        internlm2_tokenizer(tmp_path)
