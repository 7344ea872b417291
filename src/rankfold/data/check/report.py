"""``Report``: everything that a check found, ready for a terminal, a page or a program."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rankfold.data.check.balance import Lengths
from rankfold.data.check.findings import explained
from rankfold.data.check.fixed import FixedFile
from rankfold.data.check.ledger import Finding, State
from rankfold.data.tokens.proof import MaskProof

OK, WOULD_STOP, UNREADABLE = 0, 1, 2  # exit statuses


@dataclass(kw_only=True)
class Report:
    """The whole check.  Its size does not grow with the number of rows.

    ``status``: 0 if training would start; 1 if rows break a rule of training, 2 if rows cannot even be
    read, and more of them than may be skipped."""

    name: str
    model: str | None
    shapes: list[tuple[str, int]]
    states: list[tuple[State, int]]
    reasons: list[tuple[tuple[State, str], int]]
    findings: list[Finding]
    lengths: Lengths | None
    languages: list[tuple[str, int]]
    labels: list[tuple[str, int]]
    status: int
    verdict: str
    notes: list[str]
    fixed: FixedFile | None = None
    proof: MaskProof | None = None
    seconds: float = 0.0

    @property
    def kept(self) -> int:
        return dict(self.states)["kept"]

    @property
    def cut(self) -> int:
        return dict(self.states)["cut"]

    @property
    def dropped(self) -> int:
        return dict(self.states)["dropped"]

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.states)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "data": self.name,
            "model": self.model,
            "status": self.status,
            "verdict": self.verdict,
            "rows": self.rows,
            **dict(self.states),
            "reasons": [{"state": state, "rule": rule, "rows": rows} for (state, rule), rows in self.reasons],
            "findings": [
                {
                    "rule": finding.rule,
                    "state": finding.state,
                    "stops_training": finding.stops,
                    "rows": finding.rows,
                    "times": finding.times,
                    "meaning": explained(finding.rule),
                    "examples": [{"origin": origin, "text": text} for origin, text in finding.examples],
                }
                for finding in self.findings
            ],
            "lengths": asdict(self.lengths) if self.lengths else None,
            "shapes": dict(self.shapes),
            "languages": dict(self.languages),
            "labels": dict(self.labels),
            "notes": self.notes,
            "fixed": asdict(self.fixed) if self.fixed else None,
            "seconds": round(self.seconds, 3),
            "mask": asdict(self.proof) if self.proof else None,
        }
