"""Several sources of rows as one set of examples, each counted as often as its weight says."""

from __future__ import annotations

import math
import os
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.reading.rows import check_bad_share, stream_rows
from rankfold.data.reading.text_file import known_encoding
from rankfold.data.shapes.convert import Converted, convert, prompt_style
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.example_store import FEW, ExampleStore, pick
from rankfold.data.shapes.meta_file import meta_entries
from rankfold.errors import DataError
from rankfold.models.choices import PromptStyle
from rankfold.settings import split_at_commas

# Settings that say how rows are read.
Encoding = Annotated[str | None, AfterValidator(lambda name: None if name is None else known_encoding(name))]
LeftOut = Annotated[list[str], BeforeValidator(split_at_commas)]
WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows are (see ``rows.stream_rows``), how often each counts, and their shape if not detected.

    ``weight`` 2 uses every example twice an epoch, 0.5 one half of them, 1.5 all and one half again.
    ``images``: the folder in which relative paths of images start, that of the rows' file if it is None.
    ``left_out`` says what another program would have done with these rows and this one does not.
    ``encoding`` is that of text files, told by their bytes if it is None; ``leave_out`` names columns, and
    kinds of parts of messages, that are passed over."""

    path: str | Path
    weight: float = 1.0
    shape: str | None = None
    images: str | Path | None = None
    left_out: str = ""
    encoding: str | None = None
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"the weight of {self.path} must be a number above 0, got {self.weight}")

    def rows(self) -> Iterator[Row | BadRow]:
        return stream_rows(self.path, self.images, self.encoding)

    @property
    def name(self) -> str:
        """The file's or folder's name without what leads to it; a hub data set's whole name."""
        path = str(self.path)
        return os.path.basename(path.rstrip("/")) if _is_there(path) else path


@dataclass(frozen=True, slots=True)
class Mixture:
    """Examples of all sources; what was found, in words; the rows that were left out; and what was read
    otherwise than it is written.  ``first``: see ``Converted``."""

    examples: Sequence[Example]
    first: dict[str, Example]
    prompt_style: PromptStyle
    description: str
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...] = ()


def sources_of(
    data: str | Path | Iterable[Source],
    shape: str | None = None,
    encoding: str | None = None,
    leave_out: Iterable[str] = (),
) -> list[Source]:
    """The sources that ``data`` names: one, or several with weights as in ``a.jsonl:2,b.parquet:1``.
    What exists as a path is one source, whatever commas and colons are in its name; a meta file of InternVL
    stands for the sources that it names.

    ``shape``, ``encoding`` and ``leave_out`` are for the sources that say none of their own."""
    return [
        replace(
            part,
            shape=part.shape or shape,
            encoding=part.encoding or encoding,
            leave_out=part.leave_out or tuple(leave_out),
        )
        for source in _named(data)
        for part in _parts(source)
    ]


def _named(data: str | Path | Iterable[Source]) -> list[Source]:
    if not isinstance(data, str | Path):
        return list(data)
    if _is_there(str(data)):
        return [Source(data)]
    sources = []
    for part in map(str.strip, str(data).split(",")):
        if not part:
            raise DataError(f"a source without a name in {str(data)!r}")
        weighted = None if _is_there(part) else WEIGHT.fullmatch(part)
        path, weight = (weighted[1], float(weighted[2])) if weighted else (part, 1.0)
        sources.append(Source(path, weight))
    return sources


def _parts(source: Source) -> list[Source]:
    """The sources that ``source`` names if it is a meta file of InternVL, else itself."""
    entries = meta_entries(Path(os.path.expanduser(source.path)))
    if entries is None:
        return [source]
    return [
        replace(
            source,
            path=entry.rows,
            weight=source.weight * entry.weight,
            images=entry.images,
            left_out=entry.left_out,
        )
        for entry in entries
    ]


def _is_there(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def read_examples(sources: Iterable[Source], seed: int = 0, skip_bad: float = 0.0) -> Mixture:
    """Read, convert and mix.  The order is that of the sources; a fraction of a weight picks examples by
    ``seed`` and the place of the source, so the same call always gives the same examples.

    Up to the share ``skip_bad`` of a source's rows may be bad: unreadable, of no shape, or against a fatal
    rule.  Raises DataError listing all of them if there are more, if nothing is left, or if text and
    messages are mixed."""
    examples, places = ExampleStore(), array("I")
    first: dict[str, Example] = {}
    bad: list[BadRow] = []
    notes: list[str] = []
    described, styles = [], {}
    for place, source in enumerate(sources):
        start = len(examples)
        converted = _converted(source, skip_bad, examples)
        first = converted.first | first
        bad += converted.bad
        notes += converted.told
        drawn = weighted(range(start, len(examples)), source.weight, f"{seed}/{place}")
        if not drawn:
            raise DataError(f"the weight {source.weight:g} leaves none of the rows of {source.path}")
        styles[prompt_style(converted)] = source.path
        places.extend(drawn)
        times = "" if source.weight == 1 else f", {source.weight:g} times: {len(drawn):,} examples"
        left_out = f"; not done: {source.left_out}" if source.left_out else ""
        described.append((source, converted.description + times + left_out))
    if not places:
        raise DataError("no source of data was named")
    if len(styles) > 1:
        raise DataError(
            f"{styles['plain']} holds running text and {styles['chat']} messages; train on one kind"
        )
    names = len(described) > 1
    words = "; ".join(f"{source.path}: {text}" if names else text for source, text in described)
    as_read = len(examples) > FEW and all(source.weight == 1 for source, _ in described)
    mixed = examples if as_read else pick(examples, places)
    return Mixture(mixed, first, styles.popitem()[0], words, tuple(bad), tuple(notes))


def weighted(places: range, weight: float, seed: str) -> Sequence[int]:
    """Each of ``places`` ``floor(weight)`` times, and the nearest whole number to the rest of the weight
    drawn by ``seed`` without replacement, in their order."""
    whole = math.floor(weight)
    count = round((weight - whole) * len(places))
    drawn = sorted(random.Random(seed).sample(places, count))
    return [*chain.from_iterable(repeat(places, whole)), *drawn] if weight != 1 else places


def _converted(source: Source, skip_bad: float, into: ExampleStore) -> Converted:
    unreadable: list[BadRow] = []
    rows = 0

    def readable() -> Iterable[Row]:
        nonlocal rows
        for rows, row in enumerate(source.rows(), start=1):  # noqa: B007 - the count is used
            if isinstance(row, Row):
                yield row
            else:
                unreadable.append(row)

    converted = convert(readable(), source.shape, source.leave_out, into)
    if not rows:
        raise DataError(f"{source.path} holds no rows")
    converted.bad[:0] = unreadable
    check_bad_share(converted.bad, rows, skip_bad, f"the rows in {source.path} cannot be used")
    if not converted.first:
        raise DataError(f"every row of {source.path} is bad; nothing is left to train on")
    return converted
