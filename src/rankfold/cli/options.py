"""Command-line options made from the fields of a settings class, and the ones that verbs share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from rankfold.models.answering.sampling import Sampling
from rankfold.settings import CheckedSettings

F = TypeVar("F", bound=Callable[..., Any])


def options_of(
    settings: type[CheckedSettings],
    *,
    arguments: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """One ``--option`` for each field of ``settings`` but those that are ``arguments``; ``flags`` are
    options of another name than their field's.  Values go on as text: ``settings.of`` checks them, so
    that all mistakes are told at once."""
    renamed = flags or {}

    def decorate(function: F) -> F:
        for name, field in reversed(settings.model_fields.items()):
            if name in arguments:
                continue
            shown = "" if field.is_required() else _shown(field.default)
            flag = renamed.get(name, f"--{name.replace('_', '-')}")
            is_switch = field.annotation in (bool, bool | None)
            function = click.option(
                f"{flag}/--no{flag[1:]}" if is_switch else flag,
                name,
                default=None,
                metavar=None if is_switch else "VALUE",
                help=f"{field.description}{shown}{' (required)' if field.is_required() else ''}",
            )(function)
        return function

    return decorate


def _shown(default: object) -> str:
    """A default as help tells it: not at all if it says that something is left out."""
    told = ", ".join(map(str, default)) if isinstance(default, list) else default
    return "" if told is None or told is False or told == "" else f" [{told}]"


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def model_options(function: F) -> F:
    """``--adapter``, ``--model``, ``--allow`` and how to sample."""
    function = options_of(Sampling, arguments=("stop",))(function)
    function = click.option(
        "--stop", multiple=True, metavar="TEXT", help=Sampling.model_fields["stop"].description
    )(function)
    function = click.option(
        "--allow",
        multiple=True,
        metavar="FAULT",
        help="load an adapter in spite of a fault, which is then told: missing, unexpected, shape, "
        "non_finite, base, hash, config or option; may be given several times",
    )(function)
    function = click.option(
        "--eos-token",
        default="",
        metavar="TOKEN",
        help="what ends a text, where the model's files name no token",
    )(function)
    function = click.option("--model", help="base model: folder, .gguf file or hub id [the adapter's]")(
        function
    )
    return click.option("--adapter", type=Path, help="adapter folder, such as a run's output folder")(
        function
    )


def open_model(options: dict[str, Any]) -> tuple[Any, Sampling]:
    """The model that ``model_options`` name, and how its answers are drawn; what a user should know of both
    is said on standard error."""
    from rankfold.models.answering.sampling import told_of_own_settings
    from rankfold.models.base.load import load

    drawn = {name: value for name, value in given(options).items() if name in Sampling.model_fields}
    settings = Sampling.of(drawn)
    base = load(options["adapter"], options["model"], options["allow"], options["eos_token"])
    for note in (*base.notes, *told_of_own_settings(base.model, settings)):
        click.echo(f"note: {note}", err=True)
    return base, settings
