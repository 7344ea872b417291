"""How a check looks in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankfold.cli.console import print_proof
from rankfold.data.check.balance import Lengths
from rankfold.data.check.findings import explained
from rankfold.data.check.fixed import LISTED, FixedFile
from rankfold.data.check.hints import printable
from rankfold.data.check.report import Report

PLACES = 3  # shown of each finding; the page has more
BAR = 30  # characters
STYLES = {"kept": "green", "cut": "yellow", "dropped": "red"}


@contextmanager
def watched(console: Console) -> Iterator[Callable[[int], None]]:
    """Shows in a terminal how many rows were seen; prints nothing elsewhere."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("reading the rows") as status:
        yield lambda rows: status.update(f"reading the rows: {rows:,}")


def print_report(console: Console, report: Report) -> None:
    """The whole report: verdict, ledger, findings, lengths, balance, what was mended, and the mask."""
    _print_ledger(console, report)
    _print_findings(console, report)
    if report.lengths:
        _print_lengths(console, report.lengths)
    _print_counted(console, "Languages (a rough count)", report.languages, report.rows)
    _print_counted(console, "Labels", report.labels, report.rows)
    if report.fixed:
        _print_fixed(console, report.fixed)
    if report.proof:
        print_proof(console, report.proof)
    console.print()


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(headings))
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in ("rows", "share") else "left", overflow="fold"
        )
    return table


def _print_ledger(console: Console, report: Report) -> None:
    shapes = ", ".join(f"{count:,} of {shape}" for shape, count in report.shapes)
    speed = f"{report.rows / report.seconds:,.0f} rows/s" if report.seconds else ""
    console.print(f"\n{report.name}: {report.rows:,} rows in {report.seconds:.1f} s ({speed})", style="bold")
    if shapes:
        console.print(f"shape: {shapes}")
    table = _table("", "rows", "why")
    for state, count in report.states:
        why = ", ".join(f"{rows:,} {rule}" for (of, rule), rows in report.reasons if of == state)
        table.add_row(Text(state, style=STYLES[state]), f"{count:,}", why)
    table.add_row("all", f"{report.rows:,}")
    console.print(table)
    console.print(report.verdict, style="bold green" if report.status == 0 else "bold red")
    for note in report.notes:
        console.print(f"note: {note}", style="yellow")


def _print_findings(console: Console, report: Report) -> None:
    if not report.findings:
        return
    console.print("\nWhat was found", style="bold")
    for finding in report.findings:
        effect = f"{finding.state}, stops training" if finding.stops else finding.state
        rows = f"{finding.rows:,} row{'s' if finding.rows != 1 else ''}"
        console.print(
            Text.assemble(
                (finding.rule, "red" if finding.stops else "cyan"),
                f"  {rows} ({effect}): ",
                explained(finding.rule),
            )
        )
        for origin, text in finding.examples[:PLACES]:
            console.print(Text(f"    {printable(origin)}: {printable(text)}", style="dim"), soft_wrap=True)
        if finding.rows > PLACES:
            console.print(f"    ... and {finding.rows - PLACES:,} more", style="dim")


def _print_lengths(console: Console, lengths: Lengths) -> None:
    console.print(f"\nLength in {lengths.unit}", style="bold")
    bars = _coarser(lengths.bars)
    most = max(rows for _, rows in bars)
    table = _table("up to", "rows", "")
    for end, rows in bars:
        bar = "#" * round(BAR * rows / most) or ("." if rows else "")
        table.add_row(f"{end:,}", f"{rows:,}", Text(bar, style="yellow" if end > lengths.cut else "blue"))
    console.print(table)
    console.print(
        f"median {lengths.median:,}, mean {lengths.mean:,.1f}, longest {lengths.longest:,}, "
        f"together {lengths.total:,}"
    )
    console.print(
        f"chosen length: {lengths.cut:,} {lengths.unit}, {lengths.reason}; {lengths.over:,} rows are longer"
    )
    if lengths.unit != "tokens":
        hint = "a run counts tokens, so nothing is left out for its length here: name the model with --model"
        console.print(hint, style="dim")


def _coarser(bars: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Two bars as one, from the first that holds a row."""
    pairs = [bars[place : place + 2] for place in range(0, len(bars), 2)]
    joined = [(pair[-1][0], sum(rows for _, rows in pair)) for pair in pairs]
    first = next(place for place, (_, rows) in enumerate(joined) if rows)
    return joined[first:]


def _print_counted(console: Console, title: str, counted: list[tuple[str, int]], rows: int) -> None:
    if not counted:
        return
    console.print(f"\n{title}", style="bold")
    table = _table("", "rows", "share")
    for name, count in counted:
        table.add_row(printable(name), f"{count:,}", f"{100 * count / rows:.1f} %")
    console.print(table)


def _print_fixed(console: Console, fixed: FixedFile) -> None:
    told = f"{fixed.mended:,} mended, {fixed.left_out:,} left out"
    console.print(f"\n{fixed.rows:,} rows written to {fixed.path}: {told}", style="bold", soft_wrap=True)
    for origin, what in fixed.first:
        console.print(f"    {printable(origin)}: {what}", soft_wrap=True)
    if (more := sum(fixed.done.values()) - LISTED) > 0:
        console.print(f"    ... and {more:,} more")
    console.print(f"every change stands in {fixed.changes_file}", soft_wrap=True)
