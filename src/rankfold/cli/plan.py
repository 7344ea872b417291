"""``rankfold plan``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import given, options_of
from rankfold.train.asked.recipe_file import parse_changes, read_recipe
from rankfold.train.planning.forecast import ForecastRequest


@click.command("plan")
@click.argument("words", nargs=-1, metavar="[MODEL | CONFIG.json | RECIPE.yaml] [KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="print the same as JSON")
@options_of(ForecastRequest, arguments=("out",))
def command(words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Tell what a run would take in memory and time, before any weight is there.

    Only the config is read (a folder with config.json is enough), the rows, and the tokenizer if there
    is one.  The settings are those of `rankfold train`, also from a recipe.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.plan_view import print_forecast
    from rankfold.train.planning.forecast import forecast

    first = words[:1] if words and "=" not in words[0] else ()
    settings: dict[str, Any] = {}
    if first and Path(first[0]).suffix in (".yaml", ".yml"):
        settings = read_recipe(Path(first[0]))
    elif first:
        settings = {"model": first[0]}
    settings |= parse_changes(words[len(first) :])
    told = forecast(ForecastRequest.of(settings | given(options)))
    if as_json:
        click.echo(json.dumps(told.as_json(), indent=2, ensure_ascii=False))
    else:
        print_forecast(make_console(sys.stdout), told)
