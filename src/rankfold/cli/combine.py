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
@click.option("--data", metavar="VALUE", help="rows on which to judge the adapters and what becomes of them")
@click.option("--json", "as_json", is_flag=True, help="print the same as JSON, without judging")
def command(adapters: tuple[Path, ...], out: Path, data: str | None, as_json: bool, **options: Any) -> None:
    """Make one adapter of several, from their files alone, and tell how alike they are.

    The updates are combined in a small basis that all of them lie in, so the weighted sum is exact. Whether
    the result is any good is for rows to say: --data judges it beside the adapters as rankfold eval does,
    which has more to say on how.
    """
    from rankfold.cli.combine_view import print_combined
    from rankfold.cli.console import make_console
    from rankfold.models.adapters.combine import combine_adapters

    done = combine_adapters(adapters, out, asked_of(options, CombineRequest))
    if as_json:
        click.echo(json.dumps(done.as_json(), indent=2, ensure_ascii=False))
        return
    console = make_console(sys.stdout)
    print_combined(console, done)
    if data is not None:
        from rankfold.cli.eval_view import print_evaluation, watched
        from rankfold.judging.request import EvalRequest
        from rankfold.models.choices import ModelRequest
        from rankfold.train.judging.evaluate import evaluate

        names = [str(each) for each in (*adapters, out)]
        with watched(console) as (on_model, on_progress):
            judged = evaluate(EvalRequest.of({"data": data}), names, ModelRequest(), on_model, on_progress)
        print_evaluation(console, judged)
