"""``rankfold schema``"""

from __future__ import annotations

import json

import click

from rankfold.train.asked.recipe import Recipe


@click.command("schema")
def command() -> None:
    """Print the JSON schema of a recipe: every setting, its limits and its meaning."""
    click.echo(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
