"""``rankfold demo``"""

from __future__ import annotations

import importlib.resources
import sys
from itertools import count
from pathlib import Path

import click

from rankfold.cli.train import run
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.train.asked.recipe import Recipe

JOKES_OUT = Path("runs/cold-jokes")
DIGITS_OUT = Path("runs/digits")
EPOCHS = 2  # a third pass takes half as long again and lowers the held-out loss by 0.02 nats


@click.command("demo")
@click.option(
    "--out",
    type=Path,
    help=f"folder for all that the demo leaves [{JOKES_OUT}, or {DIGITS_OUT}; or -2, -3 ...]",
)
@click.option("--model", help="base model: folder, .gguf file or hub id [a small chat model]")
@click.option("--vision", is_flag=True, help="teach it to read handwritten digits instead")
def command(out: Path | None, model: str | None, vision: bool) -> int:
    """Fine-tune a small chat model on the cold jokes that come with rankfold: data in, adapter, numbers
    and report out.  Takes a few minutes on a laptop without a GPU.

    With --vision the same chat model is given eyes that have seen nothing yet, and learns to read
    handwritten digits, within a quarter of an hour."""
    if vision:
        return _digits(out or _free_folder(DIGITS_OUT), model)
    jokes = importlib.resources.files("rankfold.data") / "cold_jokes"
    with (
        importlib.resources.as_file(jokes / "train.jsonl") as train_file,
        importlib.resources.as_file(jokes / "test.jsonl") as test_file,
    ):
        options = {"data": train_file, "held_out": test_file, "epochs": EPOCHS}
        options["out"] = out or _free_folder(JOKES_OUT)
        return run(Recipe.of(options | ({"model": model} if model else {})))


def _digits(out: Path, model: str | None) -> int:
    from rankfold.cli.console import make_console
    from rankfold.cli.digits_view import print_outcome
    from rankfold.cli.view import TerminalListener
    from rankfold.digits.lesson import Lesson, teach
    from rankfold.train.stopping import STATUS_OF_SIGNAL

    console = make_console(sys.stdout)
    lesson = Lesson(out=out, language=model or DEFAULT_MODEL)
    outcome = teach(lesson, TerminalListener(console))
    if outcome.run.stopped_by:
        return STATUS_OF_SIGNAL + outcome.run.stopped_by
    print_outcome(console, lesson, outcome)
    return 0


def _free_folder(usual: Path) -> Path:
    numbered = (usual.with_name(f"{usual.name}-{number}") for number in count(2))
    return usual if not usual.exists() else next(path for path in numbered if not path.exists())
