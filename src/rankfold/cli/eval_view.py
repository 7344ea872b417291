"""How an evaluation looks in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rankfold.judging.evaluation import Evaluation
from rankfold.judging.harness import TaskScore
from rankfold.judging.judged import OnProgress
from rankfold.judging.page import table, verdicts

PLAIN_LINES = 4  # about so many lines for each thing done, where the output is no terminal
STYLES = {"good": "green", "bad": "red", "": ""}


@contextmanager
def watched(console: Console) -> Iterator[tuple[Callable[[str], object], OnProgress]]:
    """Within the block what is given is told the model and the rows done: a bar, or now and then a line."""
    if not console.is_terminal:
        lines = _Lines(console)
        yield lines.on_model, lines.on_progress
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as bar:
        task = bar.add_task("", total=None)
        at = ["", ""]

        def on_model(name: str) -> None:
            at[:] = [name, ""]

        def on_progress(what: str, done: int, count: int) -> None:
            if what != at[1]:
                at[1] = what
                bar.reset(task, description=f"{at[0]}: {what}", total=count)
            bar.update(task, completed=done)

        yield on_model, on_progress


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console, self.name = console, ""

    def on_model(self, name: str) -> None:
        self.name = name

    def on_progress(self, what: str, done: int, count: int) -> None:
        if done == count or done % max(1, count // PLAIN_LINES) == 0:
            self.console.print(f"{self.name}: {what} row {done:,}/{count:,}", soft_wrap=True)


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """The numbers, where the models differ most, and what a reader should know."""
    data = evaluation.data
    console.print(f"\nOn {len(data.rows):,} rows of {evaluation.source}", style="bold", soft_wrap=True)
    console.print(f"{data.kind.reason}", style="dim", soft_wrap=True)
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for name in evaluation.names:
        shown.add_column(name, justify="right", overflow="fold")
        if name != evaluation.names[0]:
            shown.add_column("gap", justify="right")
            shown.add_column("")
    for line in table(evaluation):
        cells: list[Text] = [Text(line.name)]
        for cell in line.cells:
            cells.append(Text.assemble(cell.number, (f"  {cell.interval}", "dim")))
            if cell.gap:
                style = STYLES[cell.colour]
                cells.append(Text.assemble((cell.gap, style), (f"  {cell.gap_interval}", "dim")))
                cells.append(Text(cell.verdict, style=style))
        shown.add_row(*cells)
    console.print(shown)
    for verdict in verdicts(evaluation):
        console.print(f"{verdict}.", style=STYLES[verdict.colour] or None, soft_wrap=True)
    _print_rows(console, evaluation)
    for note in evaluation.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)


def print_tasks(console: Console, scores: dict[str, list[TaskScore]]) -> None:
    """What lm-evaluation-harness told of each model: a number, and its standard error."""
    console.print("\nTasks of lm-evaluation-harness, with standard errors", style="bold")
    shown = Table("task", "metric", box=None, pad_edge=False)
    for name in scores:
        shown.add_column(name, justify="right", overflow="fold")
    for lines in zip(*scores.values(), strict=True):
        error = ("" if line.error is None else f" ± {line.error:.4f}" for line in lines)
        cells = [f"{line.value:.4f}{around}" for line, around in zip(lines, error, strict=True)]
        shown.add_row(lines[0].task, lines[0].metric, *cells)
    console.print(shown)


def _print_rows(console: Console, evaluation: Evaluation) -> None:
    if evaluation.shown and len(evaluation.names) > 1:
        console.print("\nWhere they differ most", style="bold")
    main = evaluation.main.name
    for row in evaluation.shown:
        console.print(f"\n{row.row.origin}  {_short(row.prompt)}", style="cyan", soft_wrap=True)
        if row.row.wanted:
            console.print(Text.assemble(("  wanted  ", "dim"), _short(row.row.wanted)))
        for name in evaluation.names:
            score = f"  {name}  {main} {row.scores[name][main]:.3g}  "
            console.print(Text.assemble((score, "dim"), _short(row.answers[name])))


def _short(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."
