"""How the outcome of the demonstration with digits looks in a terminal."""

from __future__ import annotations

from rich.console import Console

from rankfold.cli.view import command_name
from rankfold.digits.lesson import Lesson, Outcome
from rankfold.digits.rows import QUESTION, TEST, read_rows


def print_outcome(console: Console, lesson: Lesson, outcome: Outcome) -> None:
    """Digits read right before and after, what became of plain chat, where everything is, how to go on."""
    console.print(f"\n{outcome.digits} digits that nothing was trained or chosen on", style="bold")
    for name, share in (("before", outcome.before), ("after", outcome.after)):
        right = round(share * outcome.digits)
        console.print(f"{name:7} {share:6.1%} read right ({right} of {outcome.digits})")
    console.print("An answer counts if it is the digit and nothing else; by chance 10 % would be right.")
    if text := outcome.text:
        console.print(f"\nPlain chat: {text.rows} cold jokes, never trained on", style="bold")
        console.print(
            f"loss {text.base_loss:.4f} before, {text.tuned_loss:.4f} after: {text.gap:+.4f} nats per token "
            f"({text.gap_low:+.4f} to {text.gap_high:+.4f})"
        )
        console.print(_text_verdict(text.gap_low, text.gap_high))
    console.print(f"\nall of it took {outcome.seconds:,.0f} s, and {outcome.cpu_seconds:,.0f} s of CPU time")
    console.print(f"picture  {outcome.picture}")
    console.print(f"adapter  {lesson.run}  (PEFT's format)")
    image = read_rows(lesson.rows / f"{TEST}.jsonl")[0].image
    console.print("\nShow it one yourself:", style="bold")
    console.print(
        f"  {command_name()} generate --adapter {lesson.run} --prompt {QUESTION} --image {image}",
        soft_wrap=True,
    )


def _text_verdict(low: float, high: float) -> str:
    if low > 0:
        return "Learning to see has cost some of what the model knew of plain chat."
    if high < 0:
        return "It has not got worse at plain chat."
    return "Before and after cannot be told apart on plain chat."
