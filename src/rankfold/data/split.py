"""Holding rows out of training, so that the tuned model can be judged on what it has not seen."""

from __future__ import annotations

import hashlib
import math

from rankfold.data.example import Example
from rankfold.errors import DataError

HELD_OUT_SHARE = 0.05
HELD_OUT_MOST = 200


def split_held_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows: 5 % of the different rows, at least one, at most 200, picked by a hash
    of their content; copies of a held-out row are in neither.

    Raises DataError if fewer than two different rows are there."""
    different = {fingerprint(example): example for example in examples}
    if len(different) == 1:
        raise DataError("all rows are the same; one to train on and another to judge on are the least")
    count = min(HELD_OUT_MOST, math.ceil(HELD_OUT_SHARE * len(different)))
    held_out = [different[key] for key in sorted(different)[:count]]
    train, _ = without_leaks(examples, held_out)
    return train, held_out


def without_leaks(train: list[Example], held_out: list[Example]) -> tuple[list[Example], list[str]]:
    """``train`` without the rows that are in ``held_out`` too, and the places of those rows.

    Raises DataError if nothing is left."""
    seen = {fingerprint(example) for example in held_out}
    kept = [example for example in train if fingerprint(example) not in seen]
    if not kept:
        raise DataError("every training row is in the held-out rows too; nothing is left to train on")
    return kept, [example.origin for example in train if fingerprint(example) in seen]


def fingerprint(example: Example) -> str:
    """A hash of the row's words, the same wherever the row stands."""
    return hashlib.sha256(repr((example.messages, example.rejected, example.text)).encode()).hexdigest()
