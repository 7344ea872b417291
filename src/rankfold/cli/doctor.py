"""``rankfold doctor``"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("doctor")
@click.argument("adapter", type=Path)
@click.option("--model", help="base model: folder, .gguf file or hub id [the adapter's]")
@click.option("--repair", "out", type=Path, help="folder for the adapter with what can be mended mended")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def command(adapter: Path, model: str | None, out: Path | None, as_json: bool) -> None:
    """Look whether an adapter's files fit its base, and which programs can use it.

    No weights of the base are read. Exit status 1 if something is wrong.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.doctor_view import print_examination
    from rankfold.export import doctor

    found = doctor.examine(adapter, model)
    if as_json:
        click.echo(doctor.as_json(found))
    else:
        print_examination(make_console(sys.stdout), found)
    if out is not None:
        doctor.repair(found, out)
        click.echo(f"written  {out}")
    if found.wrong:
        sys.exit(1)
