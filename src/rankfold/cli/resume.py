"""``rankfold resume``"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rankfold.train.asked.recipe_file import parse_changes


@click.command("resume")
@click.argument("run", type=Path)
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--reset-optimizer",
    is_flag=True,
    help="start the optimiser's moments anew, for a checkpoint that has lost them",
)
def command(run: Path, changes: tuple[str, ...], reset_optimizer: bool) -> int:
    """Go on with a run that was stopped, killed or cut off, from its newest whole checkpoint.

    On a CPU it ends at the very bits it would have reached without the interruption.  Settings that
    would make it another run cannot be changed.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.view import TerminalListener
    from rankfold.train.run import resume
    from rankfold.train.stopping import STATUS_OF_SIGNAL

    listener = TerminalListener(make_console(sys.stdout))
    result = resume(run, parse_changes(changes), listener, reset_optimizer=reset_optimizer)
    return STATUS_OF_SIGNAL + result.stopped_by if result.stopped_by else 0
