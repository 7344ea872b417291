"""``rankfold selftest``"""

from __future__ import annotations

import sys

import click

BROKEN = 1


@click.command("selftest")
def command() -> int:
    """Try rankfold's arithmetic on this installation: the same step however it is cut, the same bits after
    an interruption, merging that can be undone.  Needs no model and no network; takes seconds.

    Exit status 1 if a promise is not kept."""
    from rich.table import Table

    from rankfold.cli.console import make_console
    from rankfold.train.selftest import self_test

    checks = self_test()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "found", "allowed", " "):
        table.add_column(heading, justify="right" if heading.strip() else "left")
    for check in checks:
        found, allowed = (
            f"{number:.1e}" if number else "same bits" for number in (check.difference, check.allowed)
        )
        table.add_row(check.promise, found, allowed, "kept" if check.kept else "NOT KEPT")
    make_console(sys.stdout).print(table)
    return 0 if all(check.kept for check in checks) else BROKEN
