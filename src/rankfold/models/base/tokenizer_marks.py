"""By what a tokenizer is known again: the marks of it that an adapter and the cache keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def tokenizer_marks(tokenizer: Any) -> dict[str, str]:
    """sha256 of the vocabulary (tokens and their numbers), of the merges or whatever else the tokenizer
    splits text by, and of the chat template; the same for every copy of one tokenizer."""
    parts = {
        "vocabulary": json.dumps(tokenizer.get_vocab(), sort_keys=True),
        "splitting": _splitting(tokenizer),
        "chat_template": json.dumps(tokenizer.chat_template, sort_keys=True),
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items() if text}


def tokenizer_changes(saved: Mapping[str, str], tokenizer: Any) -> list[str]:
    """In which of its marks ``tokenizer`` differs from the one in ``saved``."""
    now = tokenizer_marks(tokenizer)
    return [name for name, mark in saved.items() if name in now and now[name] != mark]


def _splitting(tokenizer: Any) -> str:
    """Normaliser, pre-tokeniser and model of a fast tokenizer as JSON; empty for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    whole = json.loads(backend.to_str())
    kept = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return json.dumps(kept, sort_keys=True)
