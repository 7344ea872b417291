"""The ledger: what becomes of every row, and why.  A few bytes a row, however many there are."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

State = Literal["kept", "cut", "dropped"]
STATES: tuple[State, ...] = ("kept", "cut", "dropped")
KEPT, CUT, DROPPED = range(3)
EXAMPLES = 5  # shown of each rule
SHOWN_CHARS = 300  # of an example
_NUMBER_AT_END = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})\Z")


@dataclass
class Finding:
    """What one rule found: in how many rows, how often, and the first EXAMPLES as (origin, text)."""

    rule: str
    state: State = "kept"
    stops: bool = False
    rows: int = 0
    times: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    last_row: int = -1


class Ledger:
    """Rows are numbered from 0 as they are opened.  A row is kept until a rule cuts or drops it; the first
    rule that drops it is its reason, or else the first that cuts it.  kept + cut + dropped = rows.

    Origins such as ``rows.jsonl:12`` are held as a name and a number: 11 bytes a row in all."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self._states = bytearray()
        self._reasons = array("H")  # 0 for none, else the place of the rule in ``_rules`` and one
        self._rules: list[str] = []
        self._names: dict[str, int] = {}
        self._name_of = array("I")
        self._numbers = array("I")

    def __len__(self) -> int:
        return len(self._states)

    def open(self, origin: str) -> int:
        """A new row, kept so far; its number."""
        number = _NUMBER_AT_END.search(origin)
        name = origin[: number.start()] if number else origin + "\0"
        self._name_of.append(self._names.setdefault(name, len(self._names)))
        self._numbers.append(int(number.group()) if number else 0)
        self._states.append(KEPT)
        self._reasons.append(0)
        return len(self._states) - 1

    def origin(self, row: int) -> str:
        """Where the row stands, as it was given to ``open``."""
        name = list(self._names)[self._name_of[row]]
        return name[:-1] if name.endswith("\0") else f"{name}{self._numbers[row]}"

    def state(self, row: int) -> State:
        return STATES[self._states[row]]

    def reason(self, row: int) -> str:
        """The rule that cut or dropped the row, or an empty string."""
        place = self._reasons[row]
        return self._rules[place - 1] if place else ""

    def note(self, row: int, rule: str, shown: str | Callable[[], str], times: int = 1) -> None:
        """``rule`` found something in ``row``, which stays what it is.  ``shown`` is made only if needed."""
        self._find(row, rule, shown, times)

    def cut(self, row: int, rule: str, shown: str | Callable[[], str]) -> None:
        """Only the start of the row is trained on."""
        self._find(row, rule, shown, 1).state = "cut"
        self._move(row, rule, CUT)

    def drop(self, row: int, rule: str, shown: str | Callable[[], str], *, stops: bool) -> None:
        """The row cannot be trained on; ``stops`` says whether training would stop for it."""
        finding = self._find(row, rule, shown, 1)
        finding.state = "dropped"
        finding.stops = stops
        self._move(row, rule, DROPPED)

    def _move(self, row: int, rule: str, state: int) -> None:
        if state > self._states[row]:
            if rule not in self._rules:
                self._rules.append(rule)
            self._states[row] = state
            self._reasons[row] = self._rules.index(rule) + 1

    def _find(self, row: int, rule: str, shown: str | Callable[[], str], times: int) -> Finding:
        finding = self.findings.setdefault(rule, Finding(rule))
        finding.times += times
        if finding.last_row != row:
            finding.last_row = row
            finding.rows += 1
            if len(finding.examples) < EXAMPLES:
                text = shown if isinstance(shown, str) else shown()
                cut = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
                finding.examples.append((self.origin(row), cut))
        return finding

    def counts(self) -> dict[State, int]:
        """How many rows are kept, cut and dropped."""
        return {state: self._states.count(place) for place, state in enumerate(STATES)}

    def reasons(self, start: int = 0, end: int | None = None) -> dict[tuple[State, str], int]:
        """How many rows (of those from ``start`` to before ``end``) were cut or dropped for which reason;
        each row counts once."""
        found: dict[tuple[State, str], int] = {}
        for state, place in zip(self._states[start:end], self._reasons[start:end], strict=True):
            if place:
                key = STATES[state], self._rules[place - 1]
                found[key] = found.get(key, 0) + 1
        return found

    def lines(self) -> Iterator[str]:
        """Every row as ``origin, state, reason``, with tabs between."""
        names = list(self._names)
        for row, (name, number) in enumerate(zip(self._name_of, self._numbers, strict=True)):
            origin = names[name][:-1] if names[name].endswith("\0") else f"{names[name]}{number}"
            yield f"{origin}\t{self.state(row)}\t{self.reason(row)}"
