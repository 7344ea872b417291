"""How several runs look in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rankfold.train.comparing.run_report import Pair, RunPart, RunsReport

STYLES = {"better": "green", "worse": "red"}


HEADINGS = ("held-out loss", "gap to its base", "general text", "steps", "time", "tokens/s", "memory")


def print_runs(console: Console, report: RunsReport) -> None:
    table = Table("", box=None, pad_edge=False)
    for name in HEADINGS:
        table.add_column(name, justify="right")
    for run in report.runs:
        table.add_row(*_cells(run))
    console.print(table)
    for run in report.runs:
        for remark in [*([run.status] if run.status != "finished" else []), *run.remarks]:
            console.print(f"{run.name}: {remark}", style="yellow")
    for pair in report.pairs:
        console.print(_told(pair), style=STYLES.get(pair.verdict), soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if report.differing:
        _print_differing(console, report)


def _told(pair: Pair) -> str:
    gap = f"{pair.gap.value:+.4f} ({pair.gap.low:+.4f} to {pair.gap.high:+.4f})"
    word = "than" if pair.verdict in STYLES else "from"
    return f"{pair.second} is {pair.verdict} {word} {pair.first} on the same rows held out: gap {gap}"


def _print_differing(console: Console, report: RunsReport) -> None:
    console.print("\nSettings that differ", style="bold")
    table = Table("", *(run.name for run in report.runs), box=None, pad_edge=False)
    for name, values in report.differing.items():
        table.add_row(name, *("-" if value is None else str(value) for value in values))
    console.print(table)


def _cells(run: RunPart) -> list[str]:
    judged, forgot = run.held_out, run.forgetting
    gap = f"{judged.gap.value:+.4f} ({judged.gap.low:+.4f} to {judged.gap.high:+.4f})" if judged else "-"
    return [
        run.name,
        f"{judged.tuned_loss:.4f}" if judged else "-",
        gap,
        f"{forgot.value:+.2f}" if forgot else "-",
        f"{run.steps:,}",
        f"{run.seconds:,.0f} s",
        f"{run.tokens / run.seconds:,.0f}" if run.seconds else "-",
        f"{run.peak_memory_bytes / 1e9:.1f} GB",
    ]
