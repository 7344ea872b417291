"""How the answering of a file looks in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rankfold.errors import bullet_list
from rankfold.predict.run import Predicted, Progress

PLAIN_LINES = 10  # about so many progress lines where the output is no terminal
EVERY_S = 60.0  # and one a minute at least
SHOWN = 10  # problems


@contextmanager
def watched(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Within the block what is given is called with the progress: a bar, or now and then a line."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"), TimeRemainingColumn())
    with Bar(TextColumn("answering"), *columns, console=console) as bar:
        task = bar.add_task("", total=None, pace="")

        def show(progress: Progress) -> None:
            done = progress.before + progress.done
            bar.update(task, total=progress.answers, completed=done, pace=pace_of(progress))

        yield show


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.last = 0.0

    def __call__(self, progress: Progress) -> None:
        if not progress.done:
            if progress.before:
                self.console.print(f"{progress.before:,} of {progress.answers:,} answers are there; going on")
            return
        due = progress.done % max(1, (progress.answers - progress.before) // PLAIN_LINES) == 0
        if due or progress.seconds - self.last >= EVERY_S:
            self.last = progress.seconds
            done = progress.before + progress.done
            left = f"{progress.seconds_left:,.0f} s left"
            self.console.print(f"answer {done:,}/{progress.answers:,}  {pace_of(progress)}  {left}")


def pace_of(progress: Progress) -> str:
    return f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.seconds else ""


def print_predicted(console: Console, predicted: Predicted) -> None:
    """What was answered, how the answers ended, and where they are."""
    progress = predicted.progress
    ends, problems = predicted.ends, predicted.problems
    words = {
        "stop": "ended by themselves",
        "length": "were cut at --max-new-tokens",
        "error": "have a problem",
    }
    told = ", ".join(f"{ends[name]:,} {text}" for name, text in words.items() if ends[name])
    console.print(f"\n{sum(ends.values()):,} answers to {predicted.rows:,} rows: {told}")
    if progress is not None and progress.done:
        console.print(
            f"{progress.done:,} of them now: {progress.tokens:,} tokens in {progress.seconds:,.1f} s, "
            f"{pace_of(progress)}"
        )
    for note in predicted.notes:
        console.print(f"note: {note}", style="yellow")
    if problems:
        console.print(bullet_list("not answered:", problems, SHOWN), style="yellow", soft_wrap=True)
    console.print(f"written  {predicted.out}", soft_wrap=True)
