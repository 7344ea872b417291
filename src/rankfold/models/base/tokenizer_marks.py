"""By what a tokenizer is known again: the marks of it that an adapter and the cache keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_known: dict[
    bytes, dict[str, str]
] = {}  # the marks of fast tokenizers: their words take a second to go through


def tokenizer_marks(tokenizer: Any) -> dict[str, str]:
    """sha256 of the vocabulary (tokens and their numbers), of the merges or whatever else the tokenizer
    splits text by, and of the chat template; the same for every copy of one tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words = _marks({"vocabulary": _vocabulary(tokenizer)})
    else:
        whole = backend.to_str()
        key = hashlib.sha256(whole.encode()).digest()
        if key not in _known:
            _known[key] = _marks({"vocabulary": _vocabulary(tokenizer), "splitting": _splitting(whole)})
        words = _known[key]
    return words | _marks({"chat_template": json.dumps(tokenizer.chat_template, sort_keys=True)})


def tokenizer_changes(saved: Mapping[str, str], tokenizer: Any) -> list[str]:
    """In which of its marks ``tokenizer`` differs from the one in ``saved``."""
    now = tokenizer_marks(tokenizer)
    return [name for name, mark in saved.items() if name in now and now[name] != mark]


def _marks(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _vocabulary(tokenizer: Any) -> str:
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _splitting(whole: str) -> str:
    """Normaliser, pre-tokeniser and model of a fast tokenizer, of which ``whole`` is all, as JSON."""
    told = json.loads(whole)
    kept = {name: told.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return json.dumps(kept, sort_keys=True)
