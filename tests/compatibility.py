"""The table in docs/peft-compatibility.md, written by a run of the tests that prove it.

A test says what it proves with ``@pytest.mark.peft(feature, theirs, ours)``; ``make compatibility`` runs all
of them and writes a row for each feature whose tests passed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "peft-compatibility.md"
RESULTS = Path(__file__).parents[1] / "conformance" / "results.json"
HEAD = """\
# Compatibility with PEFT

`make compatibility` writes this page: it runs the tests that are named in the last column and leaves out what
did not pass. "PEFT" is release {peft}. *same* means: the same outputs, files and names, tested in both
directions where files are concerned.

| feature | PEFT | rankfold | tested by |
|---|---|---|---|
"""


OWN_TESTS = """
## PEFT's own tests

`make conformance` runs the LoRA tests of PEFT's source package with rankfold in the place of `peft`. The
first column counts what PEFT itself passes here, the second what of that is about things that rankfold has.

| file | PEFT passes | of these count | rankfold passes | share |
|---|---|---|---|---|"""


class Row:
    """One feature: what PEFT does, what rankfold does, and the tests that show it."""

    def __init__(self, feature: str, theirs: str, ours: str) -> None:
        self.feature, self.theirs, self.ours = feature, theirs, ours
        self.tests: list[str] = []
        self.failed = False

    def __str__(self) -> str:
        tests = "<br>".join(f"`{test}`" for test in sorted(set(self.tests)))
        return f"| {self.feature} | {self.theirs} | {self.ours} | {tests} |"


def rows_of(items: Iterable[pytest.Item], failed: set[str]) -> list[Row]:
    """The rows that the marked tests among ``items`` prove, sorted by feature."""
    rows: dict[str, Row] = {}
    for item in items:
        for mark in item.iter_markers("peft"):
            row = rows.setdefault(mark.args[0], Row(*mark.args))
            assert (row.theirs, row.ours) == mark.args[1:], (
                f"{item.nodeid}: {row.feature} is said differently"
            )
            path, _, name = item.nodeid.partition("::")
            row.tests.append(f"{Path(path).relative_to('tests')} {name.partition('[')[0]}")
            row.failed |= item.nodeid in failed
    return [row for _, row in sorted(rows.items()) if not row.failed]


def page_of(rows: list[Row]) -> str:
    from importlib.metadata import version

    return HEAD.format(peft=version("peft")) + "".join(f"{row}\n" for row in rows) + own_tests()


def own_tests() -> str:
    """What the last ``make conformance`` measured on PEFT's own tests, and why what fails does."""
    table = json.loads(RESULTS.read_text())
    lines = [OWN_TESTS]
    for file, row in {**table, "**all**": _sum(table.values())}.items():
        share = row["passed"] / row["counted"]
        lines.append(f"| {file} | {row['peft']:,} | {row['counted']:,} | {row['passed']:,} | {share:.1%} |")
    lines += ["", "These do not count:", "", "| tests | that |", "|---|---|"]
    apart = sum((Counter(row["apart"]) for row in table.values()), Counter())
    lines += [f"| {count} | {text} |" for text, count in apart.most_common()]
    lines += ["", "These count and fail:", "", "| test | here |", "|---|---|"]
    failed = {}
    for row in table.values():
        for test, why in row["failed"].items():
            failed.setdefault((test.rpartition("::")[2].partition("[")[0], why), []).append(test)
    for (name, why), tests in failed.items():
        lines.append(f"| `{name}`{f' ({len(tests)} cases)' if len(tests) > 1 else ''} | {why} |")
    return "\n".join(lines) + "\n"


def _sum(rows: Iterable[dict]) -> dict[str, int]:
    rows = list(rows)
    return {key: sum(row[key] for row in rows) for key in ("peft", "counted", "passed")}


class Writer:
    """The plugin behind ``--write-compatibility``."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        PAGE.write_text(page_of(rows_of(session.items, self.failed)), encoding="utf-8")
