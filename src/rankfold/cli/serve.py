"""``rankfold serve``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankfold.cli.chat import named_adapters
from rankfold.cli.options import asked_of, options_of, several_model_options
from rankfold.errors import ConfigError
from rankfold.models.answering.sampling import Sampling, told_of_own_settings
from rankfold.models.choices import ModelRequest
from rankfold.serve.request import ServeRequest

if TYPE_CHECKING:
    from rankfold.serve.app import Served


@click.command("serve")
@click.argument("name", metavar="[MODEL]", required=False)
@click.argument("words", nargs=-1, metavar="[-- WORDS OF THE ENGINE]", type=click.UNPROCESSED)
@several_model_options
@options_of(ServeRequest, arguments=("origins",))
@click.option(
    "--origins", multiple=True, metavar="VALUE", help=ServeRequest.model_fields["origins"].description
)
def command(name: str | None, words: tuple[str, ...], **options: Any) -> int:
    """Answer OpenAI's clients by MODEL and by adapters on it, many requests at a time.

    Give --adapter NAME=FOLDER several times: a request names the one that answers in its field "model".
    Settings of drawing (--temperature ...) are for requests that do not say theirs."""
    if name is not None and options.get("model") is not None:
        raise ConfigError("the model is named twice: as MODEL and by --model")
    options["model"] = name or options.get("model")
    asked, sampling = asked_of(options, ServeRequest), asked_of(options, Sampling)
    adapters = named_adapters(options.pop("adapters", ()))
    if asked.engine != "own":
        if told := sorted(sampling.model_fields_set):
            raise ConfigError(
                f"{', '.join(told)}: clients say so to {asked.engine}; leave that or --engine out"
            )
        return _by_engine(adapters, asked_of(options, ModelRequest), asked, words)
    if words:
        raise ConfigError(f"{' '.join(words)}: words behind the model are for another --engine")
    try:
        from rankfold.serve import run
        from rankfold.serve.app import application
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'rankfold[serve]'") from error
    guards, listening = run.guards_of(asked), run.listen(asked)
    with listening:
        served = run.served_by(adapters, asked_of(options, ModelRequest), sampling, asked)
        _tell_notes(served, sampling)
        run.run(application(served, guards), listening, lambda: _tell(served, run.url_of(listening)))
    return 0


def _by_engine(
    adapters: dict[str, Path], model: ModelRequest, asked: ServeRequest, words: tuple[str, ...]
) -> int:
    from rankfold.serve.engines import run_engine
    from rankfold.serve.keys import key_of

    return run_engine(adapters, model, asked, key_of(asked), click.echo, words)


def _tell_notes(served: Served, sampling: Sampling) -> None:
    base = served.speakers.base
    notes = [note for each in served.speakers.by_name.values() for note in each.base.notes]
    for note in dict.fromkeys([*notes, *told_of_own_settings(base.model, sampling)]):
        click.echo(f"note: {note}", err=True)


def _tell(served: Served, url: str) -> None:
    click.echo(f"serving {', '.join(served.speakers.by_name)} at {url}")
