"""``Answer``, and what one is asked by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rankfold.models.messages.prompt import TemplateMessage

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


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn, and the tools that the model may call in its answer."""

    messages: Sequence[TemplateMessage]
    tools: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """The tokens of a prompt, what else the model reads of its images (each with one row), a text that makes
    its random numbers its own, and who gets the answer while it comes."""

    ids: list[int]
    seen: dict[str, Any]
    seed: str
    write: Callable[[str], object] | None = None
