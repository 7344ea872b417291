"""From rows of any shape to one thing: examples of messages, or of running text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from rankfold.data.reading.row import BadRow, Row
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.example_store import ExampleStore
from rankfold.data.shapes.formats import named_shape
from rankfold.data.shapes.interpret import interpret
from rankfold.errors import DataError, bullet_list
from rankfold.models.choices import PromptStyle

MOST_NAMES = 8  # of unused columns in a description


@dataclass(slots=True)
class Converted:
    """Examples that can be trained on, the rows that cannot, the shapes that were found, with counts, and the
    columns and keys that no shape had a use for.  ``first``: of each kind of example, and of those with
    pictures, the first.  ``notes``: what was read otherwise than it is written, by
    rule, the first such row with its words, and how many there are."""

    examples: ExampleStore = field(default_factory=ExampleStore)
    first: dict[str, Example] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    notes: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def description(self) -> str:
        found = [f"{count:,} rows of {shape}" for shape, count in self.shapes.items()]
        names = sorted(self.unused)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return "; ".join([*found, *([f"not used: {', '.join(names[:MOST_NAMES])}{more}"] if names else [])])

    @property
    def told(self) -> list[str]:
        """The notes as sentences."""
        return [
            first if count == 1 else f"{first}; and so {count - 1:,} more rows"
            for first, count in self.notes.values()
        ]


def convert(
    rows: Iterable[Row],
    shape: str | None = None,
    leave_out: Collection[str] = (),
    into: ExampleStore | None = None,
) -> Converted:
    """Convert every row and hold it against the rules.  A row that breaks a fatal one is bad.  ``leave_out``
    names columns, and kinds of parts, that are passed over.  The examples are added to ``into``."""
    given = named_shape(shape) if shape else None
    converted = Converted(examples=ExampleStore() if into is None else into)
    for row in rows:
        found = interpret(row, given, leave_out)
        fatal = [problem.text for problem in found.problems if problem.fatal]
        if found.example is None or fatal:
            converted.bad.append(BadRow(row.origin, "; ".join(fatal)))
            continue
        for problem in found.problems:
            first, count = converted.notes.get(problem.rule, (f"{row.origin}: {problem.text}", 0))
            converted.notes[problem.rule] = first, count + 1
        converted.examples.append(found.example)
        converted.first.setdefault(found.example.kind, found.example)
        if any(message.images for message in found.example.messages):
            converted.first.setdefault("pictures", found.example)
        converted.unused.update(found.unused)
        converted.shapes[found.shape] += 1
    return converted


def to_examples(rows: Iterable[Row], shape: str | None = None) -> tuple[Sequence[Example], PromptStyle, str]:
    """The examples, the prompt style they share, and the shapes found with the reason, in words.

    ``shape`` overrides detection (see ``named_shape``).  Raises DataError listing every row that cannot be
    trained on, or if text stands beside messages."""
    converted = convert(rows, shape)
    if converted.bad:
        texts = [f"{row.origin}: {row.problem}" for row in converted.bad]
        raise DataError(bullet_list(f"{len(texts)} problems in the rows:", texts))
    return converted.examples, prompt_style(converted), converted.description


def prompt_style(converted: Converted) -> PromptStyle:
    """``plain`` for running text, ``chat`` for all else.  Raises DataError if both are there, or nothing."""
    styles = {kind == "text" for kind in converted.first if kind != "pictures"}
    if len(styles) > 1:
        raise DataError(
            f"rows of running text stand beside rows of messages: {converted.description}; split the file"
        )
    if not styles:
        raise DataError("there are no rows to train on")
    return "plain" if styles.pop() else "chat"


def refuse_untrainable(examples: Iterable[Example], *, sees_images: bool = False) -> None:
    """Raise DataError for what a supervised run cannot use as it is: preference pairs, judged answers, and
    pictures unless the model ``sees_images``."""
    kinds: dict[str, str] = {}
    for example in examples:
        kinds.setdefault(example.kind, example.origin)
        if not sees_images and any(message.images for message in example.messages):
            kinds.setdefault("pictures", example.origin)
    for kind, way_out in WAYS_OUT.items():
        if kind in kinds:
            raise DataError(f"{kinds[kind]}: {way_out}")


WAYS_OUT = {
    "preference": "the rows are preference pairs, and this run is supervised; "
    "give the shape 'chosen' to train on the chosen answers as chats",
    "feedback": "the rows are judged answers (KTO), and this run is supervised; give the shape by its "
    "columns (prompt=COLUMN,completion=COLUMN) to train on all answers, good or bad",
    "pictures": "the row has pictures; name a model that sees them with --model",
}
