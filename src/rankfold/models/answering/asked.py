"""A prompt, and how it is to be answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.models.answering.drawing import Bend, Drawn
from rankfold.models.answering.sampling import Sampling
from rankfold.models.messages.prompt import TemplateMessage


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the user's turn, and the tools that the model may call in its answer."""

    messages: Sequence[TemplateMessage]
    tools: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Manner:
    """How prompts are answered: in the words of ``tokenizer``, up to one of the tokens ``stops``, drawn by
    ``sampling``, by the adapter that the model knows as ``adapter``; None is the model as it is, and
    ``__base__`` the one without adapters.  ``verbatim``: white space around an answer stays."""

    tokenizer: Any
    stops: frozenset[int]
    sampling: Sampling
    adapter: str | None = None
    verbatim: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """The tokens of a prompt, what else the model reads of its images (each with one row), and a text that
    makes its random numbers its own.

    ``write`` gets the answer's text while it comes, and before that ``hear`` each token, with so many of the
    likeliest ones as ``likeliest`` says; once ``gone`` says so, nobody waits for the answer any more;
    ``bend`` makes of the logits (vocabulary) those to draw from."""

    ids: list[int]
    seen: dict[str, Any]
    seed: str
    manner: Manner
    write: Callable[[str], object] | None = None
    hear: Callable[[Drawn], object] | None = None
    gone: Callable[[], bool] | None = None
    bend: Bend | None = None
    likeliest: int = 0
