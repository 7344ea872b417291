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

    DATA is a file (json, jsonl, csv, tsv, parquet, arrow, xlsx, txt or md, also .gz and .zst), a folder of
    them, a folder that datasets saved, or a hub data set. What its rows are is seen from their columns.
    """
    return run(Recipe.of(given(options)))


def run(recipe: Recipe) -> int:
    """Train with a terminal listener; the exit status."""
    from rankfold.cli.main import INTERRUPTED
    from rankfold.cli.view import TerminalListener, make_console
    from rankfold.train.run import fine_tune

    result = fine_tune(recipe, TerminalListener(make_console(sys.stdout)))
    return INTERRUPTED if result.interrupted else 0
