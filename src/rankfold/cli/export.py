"""``rankfold export``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankfold.cli.options import asked_of, options_of
from rankfold.export.request import ExportRequest

if TYPE_CHECKING:
    from rich.console import Console


@click.command("export")
@click.argument("adapter", type=Path)
@click.option(
    "--out", required=True, type=Path, help="folder for what is written; must not exist; to hub: OWNER/NAME"
)
@options_of(ExportRequest)
def command(adapter: Path, out: Path, **options: Any) -> None:
    """Write an adapter as other programs use it, with a certificate that it says the same there.

    What was written is read back by the program that it is for, where that is installed, and asked the same
    prompts as the tuned model. Where the answers differ by more than rounding explains, nothing is left.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.export_view import print_exported
    from rankfold.export.run import export_adapter

    request = asked_of(options, ExportRequest)
    console = make_console(sys.stdout)
    if request.to == "hub":
        _push(adapter, out, request, console)
        return
    done = export_adapter(adapter, out, request, lambda text: console.print(f"{text} ...", soft_wrap=True))
    print_exported(console, done)


def _push(folder: Path, out: Path, request: ExportRequest, console: Console) -> None:
    from rankfold.cli.export_view import print_parcel
    from rankfold.export.hub import parcel_of, push

    parcel = parcel_of(folder, out.as_posix())
    print_parcel(console, parcel, request.public)
    if request.yes or click.confirm("Send it?", default=False):
        console.print(f"sent  {push(parcel, not request.public)}", soft_wrap=True)
    else:
        console.print("nothing was sent")
