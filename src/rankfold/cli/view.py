"""How a run looks in a terminal, with colour or without, live or as plain lines."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rankfold.cli.console import print_proof
from rankfold.data.tokens.proof import MaskProof
from rankfold.judging.held_out import Comparison
from rankfold.judging.learnt import Learnt
from rankfold.train.keeping.listener import Listener, RunResult
from rankfold.train.keeping.names import REPORT_NAME
from rankfold.train.keeping.report import setting_rows
from rankfold.train.planning.plan import Plan
from rankfold.train.planning.rates import Probe
from rankfold.train.step.loop import StepRecord

PLAIN_LINES = 10  # about so many progress lines where the output is no terminal


class TerminalListener(Listener):
    """Prints a run as it goes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.steps = 0  # done by this process: a run may go on from a checkpoint
        self.seconds = 0.0
        self.tokens = 0

    def on_stage(self, stage: str) -> None:
        self._end_progress()
        self.console.print(f"... {stage}", style="dim")
        if self.live and stage == "training":
            self.progress = _progress_bar(self.console)
            self.task = self.progress.add_task("", total=None, loss="", pace="")
            self.progress.start()

    def on_plan(self, plan: Plan) -> None:
        print_plan(self.console, plan)

    def on_step(self, record: StepRecord) -> None:
        self.steps += 1
        self.seconds += record.seconds
        self.tokens += record.tokens
        speed, memory = f"{self.tokens / self.seconds:,.0f} tokens/s", f"{record.memory_bytes / 1e9:.1f} GB"
        if self.progress is not None:
            loss = f"loss {record.loss:.3f}"
            self.progress.update(
                self.task, total=record.steps, completed=record.step, loss=loss, pace=f"{speed}  {memory}"
            )
        elif record.step % max(1, record.steps // PLAIN_LINES) == 0 or record.step in (1, record.steps):
            left = self.seconds / self.steps * (record.steps - record.step)
            self.console.print(
                f"step {record.step}/{record.steps}  loss {record.loss:.3f}  "
                f"{speed}  {memory}  {left:,.0f} s left"
            )
        if record.held_out_loss is not None:
            self.console.print(f"after step {record.step}: held-out loss {record.held_out_loss:.4f}")
        for prompt, answer in record.answers.items():
            self.console.print(f"  {prompt}", style="dim")
            self.console.print(f"    {' '.join(answer.split())}")

    def on_stopping(self) -> None:
        # A signal calls this, perhaps in the middle of a print: the console would write its line twice.
        print("finishing this step and saving; again stops at once", file=sys.stderr, flush=True)

    def on_note(self, note: str) -> None:
        self.console.print(f"note: {note}", style="yellow")

    def on_result(self, result: RunResult) -> None:
        self._end_progress()
        print_result(self.console, result)

    def _end_progress(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def print_plan(console: Console, plan: Plan) -> None:
    """What the run will do, why with these settings, and one row with its trained tokens."""
    proof = plan.proof
    trainable, total = plan.model.get_nb_trainable_parameters()
    console.print("\nThe plan", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_column(style="dim")
    table.add_row("model", plan.recipe.model, plan.base.source.description)
    table.add_row("rows", f"{len(plan.train):,} to train on", plan.rows.shape)
    table.add_row("", f"{len(plan.held_out):,} held out", "never trained on; both models are judged on them")
    table.add_row("tokens", f"{proof.trained_tokens:,} trained of {proof.tokens:,}", _stops(proof))
    for name, value, reason in setting_rows(plan):
        table.add_row(name, value, reason)
    table.add_row("parameters", f"{trainable:,} trained", f"{100 * trainable / total:.2f} % of {total:,}")
    measured = f"at {plan.tokens_per_second:,.0f} tokens/s, as batches like the run's just took"
    table.add_row("expected", f"about {plan.expected_minutes:.1f} minutes", measured)
    console.print(table)
    if plan.probe is not None:
        print_probe(console, plan.probe)
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow")
    print_proof(console, proof)


def print_probe(console: Console, probe: Probe) -> None:
    """Each rate that was tried with its loss, and the gap to the usual one."""
    console.print(f"\nLearning rates tried, {probe.steps} steps each", style="bold")
    table = Table(box=None, pad_edge=False)
    for name in ("rate", "loss", "gap", "95 % interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for each in probe.tried:
        told = "best" if each.rate == probe.best else each.problem
        gap = (
            (f"{each.gap.value:+.4f}", f"{each.gap.low:+.4f} to {each.gap.high:+.4f}")
            if each.gap
            else ("", "")
        )
        table.add_row(f"{each.rate:g}", f"{each.loss:.4f}", *gap, told)
    console.print(table)


def _stops(proof: MaskProof) -> str:
    counts = ", ".join(f"{token} {count:,} times" for token, count in proof.stops.items())
    return f"the others are only read; answers end with {counts}"


def print_result(console: Console, result: RunResult) -> None:
    """Before and after in numbers and in words, where everything is, and how to go on."""
    if result.comparison is None:
        done = f"step {result.steps[-1].step} of {result.steps[-1].steps}" if result.steps else "no step"
        console.print(f"\nStopped after {done}.", style="bold yellow")
        console.print(f"The adapter trained so far is in {result.out}; it was not compared with the base.")
        console.print(f"\nGo on:   {command_name()} resume {result.out}", style="bold", soft_wrap=True)
        return
    else:
        learnt = result.learnt
        if learnt is not None and learnt.nothing:
            told = (
                f"\nNothing changed: the tuned model says what its base says. Likely cause: {learnt.nothing}."
            )
            console.print(told, style="bold yellow")
        print_comparison(console, result.comparison)
        if learnt is not None:
            print_learnt(console, learnt, result.comparison)
        for sample in result.samples:
            console.print(f"\n{sample.prompt}", style="bold")
            console.print(Text.assemble(("  before  ", "dim"), " ".join(sample.base.split())))
            console.print(Text.assemble(("  after   ", "green"), " ".join(sample.tuned.split())))
        console.print(f"\nadapter  {result.out}  (PEFT's format)")
        console.print(f"report   {result.out / REPORT_NAME}")
    console.print(f"\nGo on:   {command_name()} chat --adapter {result.out}", style="bold", soft_wrap=True)


def print_comparison(console: Console, comparison: Comparison) -> None:
    console.print(
        f"\nOn {comparison.rows} held-out rows ({comparison.trained_tokens:,} tokens)", style="bold"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("", "base", "tuned", "gap", "95 % interval of the gap"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(
        "loss (nats per token)",
        f"{comparison.base_loss:.4f}",
        f"{comparison.tuned_loss:.4f}",
        f"{comparison.gap:+.4f}",
        f"{comparison.gap_low:+.4f} to {comparison.gap_high:+.4f}",
    )
    table.add_row("perplexity", f"{comparison.base_perplexity:.2f}", f"{comparison.tuned_perplexity:.2f}")
    console.print(table)
    console.print(
        f"The tuned model is {comparison.verdict} ({comparison.rows_improved} of {comparison.rows})."
    )
    if comparison.caution:
        console.print(f"note: {comparison.caution}", style="yellow")


def print_learnt(console: Console, learnt: Learnt, comparison: Comparison) -> None:
    """What was learnt and forgotten, a sentence each."""
    console.print(f"{_sentence(learnt.recalled(comparison))}")
    if learnt.forgetting is not None:
        console.print(_sentence(learnt.forgetting.sentence))
        if learnt.forgetting.remedies:
            console.print(_sentence(learnt.forgetting.remedies), style="yellow")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
        console=console,
    )


def command_name() -> str:
    """The command as this user can type it: by name where it is on the PATH, else as it was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m rankfold"
    return "rankfold" if shutil.which("rankfold") else str(called)
