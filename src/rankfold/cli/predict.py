"""``rankfold predict``"""

from __future__ import annotations

import sys
from typing import Any

import click

from rankfold.cli.options import asked_of, given, model_options, options_of
from rankfold.models.answering.sampling import Sampling
from rankfold.models.choices import ModelRequest
from rankfold.predict.request import PredictRequest, sampling_of


@click.command("predict")
@options_of(PredictRequest)
@model_options
def command(**options: Any) -> int:
    """Answer every row of a file, and write the rows with their answers.

    A row is asked what it would be trained to answer; it need not hold an answer.  Without --temperature the
    likeliest answer is given.  A run that was stopped or killed goes on where it was with the same command.

    Exit status: 0, or 1 if a row could not be answered, which its own columns tell.
    """
    from rankfold.cli.console import make_console
    from rankfold.cli.predict_view import print_predicted, watched
    from rankfold.predict.answering import engine_of
    from rankfold.predict.run import AnswerColumns, Rows, predict, refuse_taken

    request, model = asked_of(options, PredictRequest), asked_of(options, ModelRequest)
    asked = given(options)
    drawn = {name: asked[name] for name in Sampling.model_fields if name in asked}
    sampling = sampling_of(drawn, request.samples)
    columns = AnswerColumns(request.column, request.samples > 1, sampling.logprobs)
    rows = Rows.looked_at(request)
    refuse_taken(rows, columns)
    console = make_console(sys.stdout)
    if request.engine != "own":
        click.echo(f"{request.engine} starts, which may take minutes", err=True)
    with engine_of(rows, sampling, model) as engine:
        for note in (*engine.notes, *_told(request.samples, sampling)):
            click.echo(f"note: {note}", err=True)
        try:
            with watched(console) as on_progress:
                predicted = predict(rows, columns, engine.answer, engine.identity, on_progress)
        except KeyboardInterrupt:
            click.echo("what was answered is kept; the same command goes on", err=True)
            raise
    print_predicted(console, predicted)
    return predicted.status


def _told(samples: int, sampling: Sampling) -> list[str]:
    alike = samples > 1 and sampling.temperature == 0
    return [f"temperature 0 gives a row the same answer {samples} times"] if alike else []
