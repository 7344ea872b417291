"""What prompts begin with in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

LEAST = 8  # tokens that are worth to be copied instead of being read


def common(one: Sequence[T], other: Sequence[T]) -> int:
    """How many first tokens, or letters, are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def reused(ids: Sequence[int], held: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The one of ``held`` that begins most like ``ids``, and how many of its tokens can be used: never the
    last of ``ids``, after which the model has to speak."""
    found = max(((common(ids, each), place) for place, each in enumerate(held)), default=(0, 0))
    tokens = min(found[0], len(ids) - 1)
    return (found[1], tokens) if tokens >= LEAST else (0, 0)
