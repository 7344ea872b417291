"""``Base``: a language model, loaded or outlined, with all that reads and writes its text."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from rankfold.models.base.find import BaseSource


@dataclass(frozen=True)
class Base:
    """A language model with its tokenizer; ``notes`` are facts a user should be told.

    ``processor`` is transformers' for a model that sees images, else None.  A base never changes: what is
    another model, tokenizer or note makes another one."""

    model: Any
    tokenizer: Any
    source: BaseSource
    notes: list[str] = field(default_factory=list)
    prompt_style: str = "chat"
    processor: Any = None

    def reading_by(self, tokenizer: Any) -> Base:
        """This base with another ``tokenizer``, which its processor uses too."""
        processor = copy.copy(self.processor)
        if processor is not None:
            processor.tokenizer = tokenizer
        return replace(self, tokenizer=tokenizer, processor=processor)

    def noting(self, notes: Iterable[str]) -> Base:
        return replace(self, notes=[*self.notes, *notes])
