"""``rankfold eval``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import asked_of, given, options_of
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
    from rankfold.cli.eval_view import print_evaluation, watched
    from rankfold.files import require_space
    from rankfold.judging.evaluation import evaluate
    from rankfold.judging.page import write_evaluation
    from rankfold.judging.rows import data_of, read_data
    from rankfold.train.asked.run_rows import is_run, rows_of_run, told_of_leaks
    from rankfold.train.keeping.names import refuse_used_folder

    request = asked_of(options, EvalRequest)
    models = [_model(name, given(options)) for name in names]
    if request.out is not None:
        refuse_used_folder(request.out)
        require_space(request.out, SPACE_BYTES)
    adapters = [model.adapter for model in models if model.adapter is not None]
    if request.data is not None:
        data, source = read_data(request), request.data
        notes = [note for run in adapters if is_run(run) for note in told_of_leaks(run, data.examples)]
        data.notes.extend(notes)
    elif adapters:
        data = data_of(request, rows_of_run(adapters[0]).held_out)
        source = f"{adapters[0]}, which it held out"
    else:
        raise click.UsageError("name the rows to judge on: --data FILE")
    console = make_console(sys.stdout)
    with watched(console) as (on_model, on_progress):
        evaluation = evaluate(request, data, models, on_model, on_progress)
    print_evaluation(console, evaluation, source)
    if request.out is not None:
        write_evaluation(evaluation, request.out, source)
        console.print(f"\nwritten  {request.out}", soft_wrap=True)


SPACE_BYTES = 20_000_000


def _model(name: str, options: dict[str, Any]) -> ModelRequest:
    """The model of that name: an adapter's folder, on --model if that is given; else a base."""
    own = {key: options[key] for key in ModelRequest.model_fields if key in options}
    if (Path(name) / "adapter_config.json").is_file():
        return ModelRequest.of({**own, "adapter": name})
    return ModelRequest.of({**{key: value for key, value in own.items() if key != "allow"}, "model": name})
