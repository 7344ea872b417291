"""``Answer``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its words; its tokens, with the one that ended it; whether that was said ("stop"), there was
    no room for more ("length"), or it could not be given ("error", and ``problem`` says why); how many tokens
    the prompt had; and the natural logarithm of each token's likelihood, if it was asked for."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None = None
    problem: str = ""

    @classmethod
    def missing(cls, problem: str, prompt_tokens: int = 0) -> Answer:
        return cls("", [], "error", prompt_tokens, None, problem)
