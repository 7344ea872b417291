"""``rankfold combine``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import asked_of, options_of
from rankfold.models.adapters.combine import CombineRequest


@click.command("combine")
@click.argument("adapters", nargs=-1, required=True, type=Path, metavar="ADAPTER...")
@click.option("--out", required=True, type=Path, help="folder for the combined adapter")
@options_of(CombineRequest)
@click.option("--json", "as_json", is_flag=True, help="print the same as JSON")
def command(adapters: tuple[Path, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Make one adapter of several, from their files alone, and tell how alike they are.

    The updates are combined in a small basis that all of them lie in, so the weighted sum is exact. Whether
    the result is any good is for rows to say: rankfold eval ADAPTER... OUT --data FILE.
    """
    from rankfold.cli.combine_view import print_combined
    from rankfold.cli.console import make_console
    from rankfold.models.adapters.combine import combine_adapters

    done = combine_adapters(adapters, out, asked_of(options, CombineRequest))
    if as_json:
        click.echo(json.dumps(done.as_json(), indent=2, ensure_ascii=False))
    else:
        print_combined(make_console(sys.stdout), done)
