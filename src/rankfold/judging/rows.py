"""The rows that models are judged on, and what they are measured by."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rankfold.data.reading.row import Row
from rankfold.data.shapes.convert import refuse_untrainable
from rankfold.data.shapes.example import Example
from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.errors import ConfigError, DataError, bullet_list
from rankfold.judging.kinds import Kind, kind_of, labels_of
from rankfold.judging.metrics import (
    FUNCTION,
    LOSSES,
    PATTERN,
    EvalRow,
    Judged,
    Metric,
    Rows,
    mean_metric,
    metric_of,
    pattern_metric,
)
from rankfold.judging.request import NO_METRIC, EvalRequest
from rankfold.judging.scores import found_by, normal

T = TypeVar("T")
MOST_CHOICES = 500


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """``examples`` and, in their order, what is known of each as ``rows``; what is measured, and why."""

    examples: list[Example]
    rows: list[EvalRow]
    kind: Kind
    metrics: list[Metric]
    labels: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def generates(self) -> bool:
        return any(metric.needs == "answers" for metric in self.metrics)

    @property
    def chooses(self) -> bool:
        return any(metric.needs == "choices" for metric in self.metrics)

    def only(self, places: Sequence[int]) -> EvalData:
        """The same with the rows at ``places`` alone."""
        return replace(
            self, examples=[self.examples[at] for at in places], rows=[self.rows[at] for at in places]
        )


def read_data(request: EvalRequest) -> EvalData:
    """The rows of ``request.data``.  Raises DataError or ConfigError."""
    assert request.data is not None
    sources = sources_of(request.data, request.shape, request.encoding, request.leave_out)
    data = read_examples(sources, request.seed, request.skip_bad)
    values: dict[str, Mapping[str, Any]] = {}
    if request.choices or request.function or request.answered:
        rows = (row for source in sources for row in source.rows())
        values = {row.origin: row.values for row in rows if isinstance(row, Row)}
    bad = [f"{row.origin}: {row.problem}" for row in data.bad]
    notes = [*data.notes, *([bullet_list(f"{len(bad)} bad rows left out:", bad, shown=3)] if bad else [])]
    refuse_untrainable(data.first.values(), sees_images=True)
    return data_of(request, list(data.examples), values, notes)


def data_of(
    request: EvalRequest,
    examples: Sequence[Example],
    values: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> EvalData:
    """``examples`` as ``request`` wants to judge on them; ``values`` are those of the rows, by their origin.

    Raises DataError or ConfigError."""
    once = list({example.origin: example for example in examples}.values())
    told = list(notes)
    if len(once) < len(examples):
        told.append(f"{len(examples) - len(once):,} rows come more than once, and count once")
    if request.rows is not None and request.rows < len(once):
        told.append(f"{request.rows:,} of {len(once):,} rows are taken, spread over them")
        once = spread(once, request.rows)
    rows = [_row(example, (values or {}).get(example.origin, {}), request.choices) for example in once]
    kind = _kind(request, once, rows)
    labels = tuple(request.labels) or kind.labels or labels_of([row.wanted for row in rows])
    metrics = _metrics(request, kind, labels, rows)
    if request.choices is None and any(metric.needs == "choices" for metric in metrics):
        rows = [replace(row, choices=labels) for row in rows]
        _refuse_other_labels(rows, labels)
    return EvalData(examples=once, rows=rows, kind=kind, metrics=metrics, labels=labels, notes=told)


def spread(rows: Sequence[T], count: int) -> list[T]:
    """``count`` of ``rows``, or all, spread evenly over them."""
    count = min(count, len(rows))
    return [rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


def question_in_words(example: Example) -> str:
    """The last turn of the prompt in words, with the names of its images."""
    content = example.prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(
        part["text"] if part["type"] == "text" else f"<{Path(part['path']).name}>" for part in content
    )


def _row(example: Example, values: Mapping[str, Any], choices: str | None) -> EvalRow:
    wanted = example.answer if example.messages else ""
    own = () if choices is None else _choices(example.origin, values, choices)
    if own:
        wanted = _chosen(example.origin, wanted, own)
    return EvalRow(origin=example.origin, wanted=wanted, values=values, choices=own)


def _choices(origin: str, values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The choices of a row: a list of texts, or of them under ``text``, as ARC has them."""
    found = values.get(column)
    found = found.get("text") if isinstance(found, Mapping) else found
    if not isinstance(found, list | tuple) or len(found) < 2 or len(set(map(str, found))) < len(found):  # noqa: PLR2004
        raise DataError(f"{origin}: column {column!r} must hold a list of two or more different choices")
    return tuple(map(str, found))


def _chosen(origin: str, wanted: str, choices: Sequence[str]) -> str:
    """The choice that ``wanted`` is: its text, its letter or its number, counted from 0."""
    texts = {normal(choice): choice for choice in choices}
    if normal(wanted) in texts:
        return texts[normal(wanted)]
    name = wanted.strip()
    letters = {chr(ord("A") + place): choice for place, choice in enumerate(choices)}
    numbers = {str(place): choice for place, choice in enumerate(choices)}
    if name in letters or name in numbers:
        return (letters | numbers)[name]
    raise DataError(f"{origin}: the answer {wanted!r} is none of its choices: {', '.join(choices)}")


def _kind(request: EvalRequest, examples: Sequence[Example], rows: Rows) -> Kind:
    if not examples[0].messages:
        return Kind("text", "running text has no answers")
    if request.choices is not None:
        return Kind("choices", f"column {request.choices!r} holds the choices of each row")
    if request.labels:
        return Kind("labels", f"{len(request.labels)} labels, as given", tuple(request.labels))
    return kind_of([row.wanted for row in rows])


def _metrics(request: EvalRequest, kind: Kind, labels: Sequence[str], rows: Rows) -> list[Metric]:
    names = [name for name in request.metrics if name != NO_METRIC]
    if not request.metrics:
        names = [*kind.metrics]
    names += [PATTERN] * (request.pattern is not None) + [FUNCTION] * (request.function is not None)
    if kind.name == "text" and names:
        raise ConfigError(f"{', '.join(names)}: the rows are running text, which has no answers to judge")
    if kind.name == "choices" and any(name.endswith("macro_f1") for name in names):
        raise ConfigError("macro_f1: each row has choices of its own, so there are no labels")
    found = [_metric(name, request, labels, rows) for name in dict.fromkeys([*LOSSES, *names])]
    if request.answered:
        found = [metric for metric in found if metric.needs == "answers"]
        if not found:
            raise ConfigError("answered: nothing of what is measured is about answers; name --metrics")
    return found


def _metric(name: str, request: EvalRequest, labels: Sequence[str], rows: Rows) -> Metric:
    if name == PATTERN and request.pattern is not None:
        if not any(found_by(request.pattern, row.wanted) for row in rows):
            raise ConfigError(f"pattern: {request.pattern.pattern} finds nothing in any answer wanted")
        return pattern_metric(request.pattern)
    if name == FUNCTION and request.function is not None:
        return function_metric(request.function)
    return metric_of(name, labels)


def _refuse_other_labels(rows: Rows, labels: Sequence[str]) -> None:
    known = {normal(label) for label in labels}
    others = Counter(row.wanted for row in rows if normal(row.wanted) not in known)
    if others:
        named = [f"{label!r}, {count:,} rows" for label, count in others.most_common()]
        raise ConfigError(bullet_list("answers that are none of the labels:", named))
    if len(labels) > MOST_CHOICES:
        raise ConfigError(
            f"choice: {len(labels):,} different answers are too many to be compared in each row (at most "
            f"{MOST_CHOICES}); name --labels or --choices, or other --metrics"
        )


def function_metric(named: str) -> Metric:
    """The mean of what the user's own function gives.  Raises ConfigError if it cannot be had."""
    function = _loaded(named)

    def scores(rows: Rows, judged: Judged) -> Tensor:
        found = []
        for answer, row in zip(judged.answers, rows, strict=True):
            try:
                found.append(float(function(answer, row.wanted, dict(row.values))))
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise ConfigError(f"{named} failed on {row.origin}, answer {answer!r}: {told}") from error
        return torch.tensor(found, dtype=torch.float64)

    metric = mean_metric(FUNCTION, f"mean of {named}", scores)
    return replace(metric, is_share=False)


def _loaded(named: str) -> Callable[[str, str, dict[str, Any]], Any]:
    file, _, name = named.rpartition(":")
    path = Path(file).expanduser()
    if not file or not path.is_file():
        raise ConfigError(f"function: wanted FILE.py:NAME with a file that is there, got {named!r}")
    specification = importlib.util.spec_from_file_location("rankfold_own_metric", path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"function: {path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"function: {path} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"function: {path} has no function {name!r}")
    return function  # type: ignore[no-any-return]
