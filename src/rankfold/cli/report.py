"""``rankfold report``"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=Path, metavar="RUN...")
@click.option("--out", type=Path, help="folder for the page and report.json; must not exist [only printed]")
@click.option("--json", "as_json", is_flag=True, help="print report.json instead")
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put runs beside each other: settings that differ, losses with tests, answers, forgetting and cost."""
    from rankfold.cli.console import make_console
    from rankfold.cli.report_view import print_runs
    from rankfold.train.comparing.page import write_runs
    from rankfold.train.comparing.run_report import report_on
    from rankfold.train.keeping.names import refuse_used_folder

    if out is not None:
        refuse_used_folder(out)
    report = report_on(runs)
    console = make_console(sys.stdout)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        print_runs(console, report)
    if out is not None:
        write_runs(report, out)
        if not as_json:
            console.print(f"\nwritten  {out}", soft_wrap=True)
