"""Examples by the million: in memory as long as they are few, then in a temporary file that is read back."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rankfold.data.on_demand import OnDemand
from rankfold.data.shapes.example import Example, Image, Message

FEW = 5_000  # so many are kept as they are
BUFFER = 1 << 20  # bytes read at a time, one example after another

_MESSAGE = ("role", "train", "reasoning", "tool_calls", "tool_call_id", "name")
_REST = ("origin", "text", "tools", "desirable", "label")


class ExampleStore(OnDemand[Example]):
    """Examples in the order in which they were added.  Beyond FEW of them each takes 8 bytes of memory."""

    def __init__(self) -> None:
        self._few: list[Example] = []
        self._ends = array("Q", [0])
        self._file: Any = None

    def append(self, example: Example) -> None:
        if self._file is None and len(self._few) < FEW:
            self._few.append(example)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=BUFFER)  # noqa: SIM115 - closed with the object
            weakref.finalize(self, self._file.close)
        line = packed(example)
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._few) + len(self._ends) - 1

    def _item(self, at: int) -> Example:
        if at < len(self._few):
            return self._few[at]
        start, end = self._ends[at - len(self._few)], self._ends[at - len(self._few) + 1]
        self._file.flush()
        return unpacked(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[Example]:
        yield from self._few
        if self._file is not None:
            self._file.flush()
            with os.fdopen(os.dup(self._file.fileno()), "rb", BUFFER) as lines:
                at = 0
                for end in islice(self._ends, 1, None):
                    lines.seek(at)  # another reader may have moved on; within the buffer this costs nothing
                    yield unpacked(lines.read(end - at))
                    at = end


class Picked(OnDemand[Example]):
    """Some of ``examples``, in the order of ``places``; one may stand in it several times."""

    def __init__(self, examples: Sequence[Example], places: array[int]) -> None:
        self._examples, self._places = examples, places

    def __len__(self) -> int:
        return len(self._places)

    def _item(self, at: int) -> Example:
        return self._examples[self._places[at]]

    def __iter__(self) -> Iterator[Example]:
        return (self._examples[at] for at in self._places)


class Joined(OnDemand[Example]):
    """Two sequences, one behind the other."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def _item(self, at: int) -> Example:
        return self._first[at] if at < len(self._first) else self._second[at - len(self._first)]


def pick(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """The examples at ``places``: a list of those in memory, otherwise a view."""
    if len(examples) <= FEW:
        return [examples[place] for place in places]
    return Picked(examples, places if isinstance(places, array) else array("I", places))


def packed(example: Example) -> bytes:
    """The example as a line of JSON, with nothing lost; the same for equal examples."""
    told: dict[str, Any] = {
        name: value for name in _REST if (value := getattr(example, name)) not in (None, ())
    }
    for name in ("messages", "rejected"):
        if turns := getattr(example, name):
            told[name] = [_told(message) for message in turns]
    return (json.dumps(told, separators=(",", ":")) + "\n").encode()


def _told(message: Message) -> dict[str, Any]:
    parts = [part if isinstance(part, str) else {"image": str(part.path)} for part in message.parts]
    rest = {name: value for name in _MESSAGE if (value := getattr(message, name)) not in (None, "", ())}
    if message.weight != 1:
        rest["weight"] = message.weight
    return {"parts": parts, **rest}


def unpacked(line: bytes) -> Example:
    told = json.loads(line)
    for name in ("messages", "rejected"):
        if name in told:
            told[name] = tuple(map(_message, told[name]))
    if "tools" in told:
        told["tools"] = tuple(told["tools"])
    return Example(**told)


def _message(told: dict[str, Any]) -> Message:
    told["parts"] = tuple(
        part if isinstance(part, str) else Image(Path(part["image"])) for part in told["parts"]
    )
    if "tool_calls" in told:
        told["tool_calls"] = tuple(told["tool_calls"])
    return Message(**told)
