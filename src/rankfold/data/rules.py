"""What must hold of an example before it is trained on: a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rankfold.data.example import Example, Message

MAX_TURNS = 2_000
IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule, and how, in words that follow on the example's origin.  A fatal one stops training."""

    rule: str
    text: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """``check`` yields what is wrong in words, nothing if the rule is kept."""

    name: str
    fatal: bool
    check: Callable[[Example], Iterator[str]]


def problems(example: Example) -> list[Problem]:
    """Every rule that ``example`` breaks."""
    return [Problem(rule.name, text, rule.fatal) for rule in RULES for text in rule.check(example)]


def _texts(example: Example) -> Iterator[tuple[str, str]]:
    if example.text:
        yield "text", example.text
    for place, message in _all_turns(example):
        yield place, message.text


def _all_turns(example: Example) -> Iterator[tuple[str, Message]]:
    for number, message in enumerate(example.messages, start=1):
        yield f"message {number}", message
    for number, message in enumerate(example.rejected, start=1):
        yield f"rejected message {number}", message


RULES: tuple[Rule, ...] = ()
