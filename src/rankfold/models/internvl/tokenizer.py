"""InternLM2's tokenizer from its ``tokenizer.model``, without the Python file that comes with it.

The file is sentencepiece's (``sentencepiece_model.proto``, protobuf wire format); what is built from it are
the steps of ``tokenization_internlm2_fast.py``: byte-pair merges in the order of scores, spaces as U+2581,
bytes where the vocabulary lacks a character."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import ModelError

MODEL_NAME, CONFIG_NAME = "tokenizer.model", "tokenizer_config.json"
SPACE = "\u2581"
BPE_TYPE = 2
CONTROL_TYPES = {2, 3}  # unknown, control: no merge makes one
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


@dataclass
class Vocabulary:
    """What a sentencepiece file says: pieces with scores and types, and whether texts begin with a space."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = 1
    dummy_prefix: bool = True


def internlm2_tokenizer(folder: Path) -> Any:
    """The tokenizer of an InternLM2 folder as a fast one.  Raises ModelError if its files are damaged."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = read_vocabulary(folder / MODEL_NAME)
    config = _config(folder)
    added = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
    specials = {name: _text(config.get(name)) or DEFAULTS[name] for name in SPECIAL_NAMES}
    built = _build(vocabulary, added, specials, bool(config.get("add_bos_token", True)))
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length") or int(1e30),
        padding_side="left",
        **specials,
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a sentencepiece model file.  Raises ModelError if it is not one of byte pairs."""
    try:
        content = path.read_bytes()
        vocabulary = _vocabulary(content)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ModelError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    if not vocabulary.pieces or vocabulary.model_type != BPE_TYPE:
        raise ModelError(f"{path} is no sentencepiece model of byte pairs, which InternLM2's is")
    return vocabulary


def _vocabulary(content: bytes) -> Vocabulary:
    vocabulary = Vocabulary()
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0]
            kind = piece.get(3, 1)
            vocabulary.pieces.append((_bytes(piece[1]).decode(), score, int(kind)))
        elif number == 2:  # noqa: PLR2004 - the trainer's settings
            vocabulary.model_type = int(dict(_fields(_bytes(value))).get(3, 1))
        elif number == 3:  # noqa: PLR2004 - the normaliser's
            vocabulary.dummy_prefix = bool(dict(_fields(_bytes(value))).get(3, 1))
    return vocabulary


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(content, place)
            yield number, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if kind == BYTES:
            size, place = _varint(content, place)
        if size is None or place + size > len(content):
            raise ValueError(f"it is damaged at byte {place:,}")
        yield number, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:  # noqa: PLR2004 - the highest bit says that more bytes follow
            return value, place


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is of another type than sentencepiece's")
    return value


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs that make a piece, in the order in which sentencepiece would merge them: by score."""
    numbers = {piece: number for number, (piece, _, kind) in enumerate(vocabulary.pieces) if kind == 1}
    scored = []
    for piece, score, kind in vocabulary.pieces:
        if kind != 1:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in numbers and right in numbers]
        known.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
        scored += [(-score, pair) for pair in known]
    return [pair for _, pair in sorted(scored, key=lambda each: each[0])]


def _build(
    vocabulary: Vocabulary, added: dict[int, Any], specials: dict[str, str], opens_with_bos: bool
) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    names = [
        added[n]["content"] if n in added else piece for n, (piece, _, _) in enumerate(vocabulary.pieces)
    ]
    words = {name: number for number, name in enumerate(names)}
    model = models.BPE(
        words, merges_of(vocabulary), unk_token=specials["unk_token"], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.dummy_prefix else []
    strip = [decoders.Strip(content=" ", left=1)] if vocabulary.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for number in sorted(added):
        fields = {
            key: added[number][key] for key in ("lstrip", "rstrip", "single_word") if key in added[number]
        }
        token = AddedToken(added[number]["content"], special=True, normalized=False, **fields)
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ModelError(f"the tokenizer's token {token.content!r} should have the number {number}")
    bos = specials["bos_token"]
    if opens_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, words[bos])]
        )
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not an object of named values")
    return config


def _text(token: Any) -> str | None:
    """The words of a special token, which may be written as an object."""
    return token.get("content") if isinstance(token, dict) else token
