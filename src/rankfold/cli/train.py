"""``rankfold train``"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import given, options_of
from rankfold.train.asked.recipe import Recipe
from rankfold.train.asked.recipe_file import parse_changes, read_recipe


@click.command("train")
@click.argument("words", nargs=-1, metavar="[RECIPE.yaml] [KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="do everything up to the first step, and write nothing")
@options_of(Recipe)
def command(words: tuple[str, ...], dry_run: bool, **options: Any) -> int:
    """Fine-tune a model on your rows with LoRA, and judge it on rows held out.

    Settings come from RECIPE.yaml, from KEY=VALUE and from options; the later ones win.  A run's folder
    holds its recipe.yaml, which repeats it.

    DATA is a file (json, jsonl, csv, tsv, parquet, arrow, xlsx, txt or md, also .gz and .zst), a folder of
    them, a folder that datasets saved, or a hub data set. What its rows are is seen from their columns.
    """
    file = words[:1] if words and "=" not in words[0] else ()
    settings = read_recipe(Path(file[0])) if file else {}
    settings |= parse_changes(words[len(file) :])
    return run(Recipe.of(settings | given(options)), dry_run)


def run(recipe: Recipe, dry_run: bool = False) -> int:
    """Train with a terminal listener; the exit status."""
    from rankfold.train.keeping.names import refuse_used_folder
    from rankfold.train.planning.rows import prepare

    prepared = None
    if recipe.adapter is None and "WORLD_SIZE" not in os.environ:  # else that takes torch, which takes time
        if not dry_run:
            refuse_used_folder(recipe.out)
        prepared = prepare(recipe)
    from rankfold.cli.console import make_console
    from rankfold.cli.view import TerminalListener
    from rankfold.train.run import decide, fine_tune
    from rankfold.train.stopping import STATUS_OF_SIGNAL

    listener = TerminalListener(make_console(sys.stdout))
    if dry_run:
        decide(recipe, listener, prepared=prepared)
        return 0
    result = fine_tune(recipe, listener, prepared)
    return STATUS_OF_SIGNAL + result.stopped_by if result.stopped_by else 0
