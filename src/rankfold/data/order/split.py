"""Holding rows out of training, so that the tuned model can be judged on what it has not seen."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rankfold.data.order.dedup import NearDuplicates
from rankfold.data.shapes.example import Example, Part
from rankfold.data.shapes.example_store import Joined, pick
from rankfold.errors import DataError

HELD_OUT_SHARE = 0.05
HELD_OUT_MOST = 200
NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*")
LARGE_GROUP = 10  # copies of one row; holding out a group with more would cost too many training rows


def how_many(value: object) -> object:
    """``"0.01"``, ``"1 %"`` and ``"200"`` as a share below 1 or a number of rows; anything else, and the name
    of a file that is there, as it is.  Raises ValueError for a number that is neither."""
    found = NUMBER.fullmatch(value) if isinstance(value, str) and not os.path.exists(value) else None
    if found is not None:
        value = float(found[1]) / (100 if found[2] else 1)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not (0 < value < 1 or (value >= 1 and value == int(value) and not (found and found[2]))):
        raise ValueError("must be a share above 0 and below 1, or a whole number of rows")
    return float(value)


def split_held_out(
    examples: Sequence[Example], held_out: float | None = None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and held-out rows, each in the order of ``examples``.

    Rows that are copies or near copies of each other, as far as ``NearDuplicates`` finds them, are one
    group and never stand on both sides.  Held out is one row each of 5 % of the groups, at least one and at
    most 200, or of the share or number of them that ``held_out`` says: those whose number, a hash of content,
    is lowest.  The other rows of these groups are on neither side.  Groups of more than LARGE_GROUP rows are
    trained on, unless there are no others.

    So the split depends on no seed and on no order.  Adding a row that is no near copy of another moves
    at most one of the earlier rows to the other side.  Where all rows are near copies of each other, only
    exact copies are a group.  Raises DataError if fewer than two different rows are there, or none would be
    left to train on."""
    keys = fingerprints(examples)
    groups = near_groups(examples, keys)
    if len(groups) == 1 and len(groups[0]) == len(examples):
        groups = exact_groups(keys)
    if len(groups) == 1 and len(groups[0]) == len(examples):
        raise DataError(
            "all rows are the same; one to train on and another to judge on are the least: name a file of "
            "others as held_out"
        )
    judged_of = {min(group, key=lambda row: (keys[row], row)): group for group in groups}
    grouped = np.zeros(len(examples), dtype=np.bool_)
    for group in groups:
        grouped[group] = True
    small = [row for row, group in judged_of.items() if len(group) <= LARGE_GROUP]
    alone = np.flatnonzero(~grouped)
    candidates = len(small) + len(alone) or len(judged_of)
    # Hashed again: the lowest of several keys tends to be low, so larger groups would be picked more often.
    picked = heapq.nsmallest(
        _count(candidates, held_out),
        chain(small, alone.tolist()) if len(small) + len(alone) else judged_of,
        key=lambda row: hashlib.sha256(bytes(keys[row])).digest(),
    )
    away = {row for judged in picked for row in judged_of.get(judged, (judged,))}
    stays = np.ones(len(examples), dtype=np.bool_)
    stays[[*away]] = False
    train = array("I", np.flatnonzero(stays).astype(np.uint32).tobytes())
    return pick(examples, train), [examples[row] for row in sorted(picked)]


def _count(groups: int, held_out: float | None) -> int:
    if held_out is None:
        return min(HELD_OUT_MOST, math.ceil(HELD_OUT_SHARE * groups))
    count = int(held_out) if held_out >= 1 else math.ceil(held_out * groups)
    if count >= groups:
        raise DataError(
            f"held_out: {count:,} rows are to be held out, and there are {groups:,} different ones"
        )
    return count


def without_leaks(
    train: Sequence[Example], held_out: Sequence[Example]
) -> tuple[Sequence[Example], list[str]]:
    """``train`` without the rows that are in ``held_out`` too, and the places of those rows.

    Raises DataError if nothing is left."""
    leaked = shared_rows(train, held_out)
    if len(leaked) == len(train):
        raise DataError("every training row is in the held-out rows too; nothing is left to train on")
    if not leaked:
        return train, []
    kept = np.delete(np.arange(len(train)), leaked).tolist()
    return pick(train, kept), [train[place].origin for place in leaked]


def shared_rows(rows: Sequence[Example], others: Sequence[Example]) -> list[int]:
    """The places in ``rows`` of those that are among ``others`` too."""
    seen = {fingerprint(example) for example in others}
    return [place for place, example in enumerate(rows) if fingerprint(example) in seen]


def near_leaks(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """The places of the rows of ``train`` that are in one group of near copies with a held-out row."""
    both = Joined(train, held_out)
    groups = near_groups(both)
    straddling = (group for group in groups if group[0] < len(train) <= group[-1])
    return [train[row].origin for group in straddling for row in group if row < len(train)]


def fingerprints(examples: Iterable[Example]) -> NDArray[np.bytes_]:
    """Of each row (see ``fingerprint``), 64 bytes of memory each."""
    return np.fromiter((fingerprint(example).encode() for example in examples), dtype="S64")


def near_groups(examples: Sequence[Example], keys: NDArray[np.bytes_] | None = None) -> list[list[int]]:
    """The numbers of the rows that are copies or near copies of each other; a row alone is in none.

    The rows are looked at in the order of their fingerprints, so the groups do not depend on theirs."""
    order = np.argsort(fingerprints(examples) if keys is None else keys, kind="stable").tolist()
    finder = NearDuplicates()
    for row in order:
        finder.add(compared_words(examples[row]))
    return [sorted(order[place] for place in group) for group in finder.groups()]


def exact_groups(keys: NDArray[np.bytes_]) -> list[list[int]]:
    """The numbers of the rows that are exact copies of each other; a row alone is in none."""
    groups: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys.tolist()):
        groups.setdefault(key, []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def compared_words(example: Example) -> str:
    """What makes a row a near copy: its words, images and tool calls.  Not its system prompt, which is
    often long and the same in rows that have nothing else in common.  Names of images are alike where the
    images are not, so each is told by a hash of its path."""
    turns = [message for message in (*example.messages, *example.rejected) if message.role != "system"]
    calls = (repr(call) for message in turns for call in message.tool_calls)
    parts = (_told(part) for message in turns for part in message.parts)
    return "\n".join([*parts, *calls, example.text])


def _told(part: Part) -> str:
    return part if isinstance(part, str) else hashlib.sha256(str(part.path).encode()).hexdigest()


def fingerprint(example: Example) -> str:
    """A hash of the row's words, the same wherever the row stands."""
    return hashlib.sha256(repr((example.messages, example.rejected, example.text)).encode()).hexdigest()
