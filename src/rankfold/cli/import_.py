"""``rankfold import``"""

from __future__ import annotations

from pathlib import Path

import click

PROGRAMS = ("xtuner",)


@click.command("import")
@click.argument("program", type=click.Choice(PROGRAMS))
@click.argument("config", type=Path)
@click.option("--out", type=Path, help="write the recipe to this new file [print it]")
def command(program: str, config: Path, out: Path | None) -> None:
    """Turn another program's config into a recipe, and tell what became of each of its values.

    A config in Python is read, never run. Without --out the recipe is printed, and the rest goes to
    standard error.
    """
    from rankfold.interop.recipe_text import recipe_text, write_recipe
    from rankfold.interop.xtuner import import_xtuner

    imported = import_xtuner(config)
    width = max(len(line.place) for line in imported.lines)
    for line in imported.lines:
        became = f"-> {line.setting}" if line.setting else "left out"
        told = f"{line.name} = {line.value}" if line.value else line.name
        why = f": {line.why}" if line.why else ""
        click.echo(f"{line.place:<{width}}  {told}  {became}{why}", err=out is None)
    if out is None:
        click.echo(recipe_text(imported, config), nl=False)
        return
    write_recipe(imported, config, out)
    click.echo(f"written  {out}")
