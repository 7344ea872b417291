"""The rows of a run that was made before, as its recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankfold.data.order.split import shared_rows
from rankfold.data.shapes.example import Example
from rankfold.errors import ConfigError, RankfoldError
from rankfold.train.asked.recipe import Recipe
from rankfold.train.asked.recipe_file import read_recipe
from rankfold.train.keeping.names import RECIPE_NAME
from rankfold.train.planning.rows import Rows, read_data


def is_run(folder: Path) -> bool:
    return (folder / RECIPE_NAME).is_file()


def rows_of_run(folder: Path) -> Rows:
    """The rows that the run in ``folder`` trained on and held out.  Raises RankfoldError."""
    if not is_run(folder):
        raise ConfigError(
            f"{folder} is no run with a {RECIPE_NAME}, so it has no rows of its own; name --data"
        )
    recipe = Recipe.of({**read_recipe(folder / RECIPE_NAME), "out": folder})
    return read_data(recipe, sees_images=True)


def told_of_leaks(folder: Path, examples: Sequence[Example]) -> list[str]:
    """What is told if the run in ``folder`` was trained on some of ``examples``; nothing if its rows are no
    longer where they were."""
    try:
        train = rows_of_run(folder).train
    except RankfoldError as error:
        told = str(error).splitlines()[0]
        return [f"whether {folder} was trained on some of these rows cannot be told: {told}"]
    leaked = shared_rows(examples, train)
    if not leaked:
        return []
    return [
        f"{len(leaked):,} of the {len(examples):,} rows are among those that {folder} was trained on "
        f"({examples[leaked[0]].origin} ...): its numbers say how well it remembers them"
    ]
