"""``rankfold eval``"""

from __future__ import annotations

import sys
from typing import Any

import click

from rankfold.cli.options import asked_of, options_of
from rankfold.judging.request import EvalRequest
from rankfold.models.choices import ModelRequest


@click.command("eval")
@click.argument("names", nargs=-1, metavar="[ADAPTER | MODEL]...")
@options_of(EvalRequest)
@options_of(ModelRequest, arguments=("adapter", "allow"))
@click.option("--allow", multiple=True, metavar="VALUE", help=ModelRequest.model_fields["allow"].description)
def command(names: tuple[str, ...], **options: Any) -> None:
    """Judge adapters and models on the same rows, by their loss and by how good their answers are.

    Where the first name is an adapter's folder, its base is judged too; where it is a run's and there is no
    --data, on the rows that the run held out. All are compared with the first on the same draws of rows.

    What is measured follows from the answers that the rows want: labels, numbers, JSON, a few words, many
    words; --metrics, --pattern or --function say it instead.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.eval_view import print_evaluation, print_tasks, watched
    from rankfold.train.judging.evaluate import evaluate, evaluate_tasks

    request, asked = asked_of(options, EvalRequest), asked_of(options, ModelRequest)
    console = make_console(sys.stdout)
    if request.tasks:
        with watched(console) as (on_model, _):
            print_tasks(console, evaluate_tasks(request, names, asked, on_model))
        if request.data is None:
            return
    with watched(console) as (on_model, on_progress):
        evaluation = evaluate(request, names, asked, on_model, on_progress)
    print_evaluation(console, evaluation)
    if request.out is not None:
        console.print(f"\nwritten  {request.out}", soft_wrap=True)
