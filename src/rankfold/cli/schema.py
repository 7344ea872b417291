"""``rankfold schema``"""

from __future__ import annotations

import json

import click


@click.command("schema")
@click.argument("of", type=click.Choice(["recipe", "report"]), default="recipe")
def command(of: str) -> None:
    """Print the JSON schema of a recipe, with every setting, its limits and its meaning; or that of the
    report.json of `rankfold report`."""
    if of == "report":
        from rankfold.train.comparing.run_report import RunsReport as Kind
    else:
        from rankfold.train.asked.recipe import Recipe as Kind  # type: ignore[assignment]
    click.echo(json.dumps(Kind.model_json_schema(), indent=2, ensure_ascii=False))
