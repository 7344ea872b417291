"""``rankfold train``"""

from __future__ import annotations

import sys
from typing import Any

import click

from rankfold.cli.options import given, options_of
from rankfold.train.recipe import Recipe


@click.command("train")
@options_of(Recipe)
def command(**options: Any) -> int:
    """Fine-tune a model on your rows with LoRA, and judge it on rows held out.

    DATA is a .jsonl file.  A row is {"messages": [{"role": ..., "content": ...}, ...]}, or
    {"prompt": ..., "completion": ...}, or has one text column of any name, such as {"jokes": ...}.
    """
    return run(Recipe.of(given(options)))


def run(recipe: Recipe) -> int:
    """Train with a terminal listener; the exit status."""
    from rankfold.cli.main import INTERRUPTED
    from rankfold.cli.view import TerminalListener, make_console
    from rankfold.train.run import fine_tune

    result = fine_tune(recipe, TerminalListener(make_console(sys.stdout)))
    return INTERRUPTED if result.interrupted else 0
