"""GGUF's keys of a tokenizer of transformers: the way back of ``tokenizer``.

How text is split before byte pairs are merged has only a name in a file.  It is found by what the tokenizer
does with a text that every way of splitting cuts otherwise."""

from __future__ import annotations

import json
from typing import Any

from rankfold.errors import ModelError
from rankfold.models.gguf.tokenizer import (
    CONTROL,
    KEY,
    ROLES,
    UNKNOWN,
    USER_DEFINED,
    pre_tokenizer,
    splits,
    table,
)

NORMAL, UNUSED, BYTE = 1, 5, 6
# Names that llama.cpp has known for long, before those that were added for one model.
USUAL_NAMES = (
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "smollm",
    "tekken",
    "deepseek-llm",
    "deepseek-v3",
    "gpt-4o",
    "dbrx",
)
# After llama.cpp's own text for that: conversion/base.py, get_vocab_base_pre.
TELLING = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL HTTPServer camelCase x1y2 a_b"
    "\r\n\r\n #x"
)


def tokenizer_keys(tokenizer: Any, rows: int) -> dict[str, Any]:
    """All keys, with the chat template, for a model that embeds ``rows`` words.

    Raises ModelError for a tokenizer that is neither byte pairs nor sentencepiece's, or that splits text as
    llama.cpp never does."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"the tokenizer is a {model.get('type')}; GGUF's are written of byte pairs and of sentencepiece's"
        )
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    tokens = [words.get(number, f"[PAD{number}]") for number in range(rows)]
    types = _types(tokenizer, words, rows)
    is_pieces = bool(model.get("byte_fallback"))
    found: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if is_pieces:
        found |= {"model": "llama", "pre": "default", "scores": _scores(model, tokens)}
        found["add_space_prefix"] = tokenizer.tokenize("x")[0].startswith("▁")
    else:
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        found |= {"model": "gpt2", "pre": _name_of_splitting(tokenizer, model), "merges": merges}
    found |= _special(tokenizer)
    keys = {KEY + name: value for name, value in found.items()}
    template = tokenizer.chat_template
    return keys | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _types(tokenizer: Any, words: dict[int, str], rows: int) -> list[int]:
    added = tokenizer.added_tokens_decoder
    found = []
    for number in range(rows):
        word = words.get(number)
        if word is None:
            kind = UNUSED
        elif number == tokenizer.unk_token_id and word == "<unk>":
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number].special else USER_DEFINED
        else:
            kind = BYTE if word.startswith("<0x") and word.endswith(">") else NORMAL
        found.append(kind)
    return found


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """sentencepiece joins the pair with the highest score first, byte pairs the one that stands first."""
    ranks: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        left, right = pair if not isinstance(pair, str) else pair.split(" ", 1)
        ranks.setdefault(left + right, place)
    return [-float(ranks.get(word, 0)) for word in tokens]


def _special(tokenizer: Any) -> dict[str, Any]:
    named = {key: getattr(tokenizer, f"{role}_id") for role, key in ROLES.items()}
    found = {key: number for key, number in named.items() if number is not None}
    if tokenizer.unk_token_id is not None:
        found["unknown_token_id"] = tokenizer.unk_token_id
    around = tokenizer("x")["input_ids"]
    return found | {
        "add_bos_token": around[0] == tokenizer.bos_token_id,
        "add_eos_token": len(around) > 1 and around[-1] == tokenizer.eos_token_id,
    }


def _name_of_splitting(tokenizer: Any, model: dict[str, Any]) -> str:
    own = tokenizer.backend_tokenizer.pre_tokenizer
    cut = None if own is None else [piece for piece, _ in own.pre_tokenize_str(TELLING)]
    found = [
        name
        for name in splits()
        if (name in table()["ignore_merges"]) == bool(model.get("ignore_merges"))
        and [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(TELLING)] == cut
    ]
    if not found:
        raise ModelError("the tokenizer splits text in a way that llama.cpp has no name for")
    return next((name for name in USUAL_NAMES if name in found), found[0])
