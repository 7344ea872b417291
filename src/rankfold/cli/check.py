"""``rankfold check``"""

from __future__ import annotations

import sys
from typing import Any

import click

from rankfold.cli.options import given, options_of
from rankfold.data.check.doctor import CheckRequest


@click.command("check")
@click.argument("data")
@options_of(CheckRequest, arguments=("data",), flags={"json_out": "--json"})
def command(**options: Any) -> int:
    """Look at every row before a run does: what would be trained, cut or left out, and why.

    Exit status: 0 if a run would start; 1 if more rows than --skip-bad break a rule that stops a run;
    2 if more rows than that cannot even be read, or if the command itself is mistaken.
    """
    from rankfold.cli.check_view import print_report, watched
    from rankfold.cli.console import make_console
    from rankfold.data.check.doctor import check

    request = CheckRequest.of(given(options))
    console = make_console(sys.stdout)
    with watched(console) as on_rows:
        report = check(request, on_rows)
    print_report(console, report)
    for path in request.outputs():
        console.print(f"written  {path}", soft_wrap=True)
    return report.status
