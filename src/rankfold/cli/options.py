"""Command-line options made from the fields of a settings class, and the ones that verbs share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click

from rankfold.models.answering.sampling import Sampling
from rankfold.models.choices import ModelRequest
from rankfold.settings import CheckedSettings

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=CheckedSettings)


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
    """Which model is asked, and how to sample."""
    return _model_options(function, ("allow",))


def _model_options(function: F, own: Collection[str]) -> F:
    for settings, name, apart in ((Sampling, "stop", ("stop",)), (ModelRequest, "allow", own)):
        function = options_of(settings, arguments=apart)(function)
        told = settings.model_fields[name].description
        function = click.option(f"--{name}", multiple=True, metavar="VALUE", help=told)(function)
    return function


def several_model_options(function: F) -> F:
    """The same, with any number of adapters, which have names."""
    told = "adapter folder, such as a run's output folder, or NAME=FOLDER; may be given several times"
    function = click.option("--adapter", "adapters", multiple=True, metavar="VALUE", help=told)(function)
    return _model_options(function, ("allow", "adapter"))


def asked_of(options: dict[str, Any], settings: type[S]) -> S:
    """The ``settings`` that the options on the command line make."""
    asked = given(options)
    return settings.of({name: asked[name] for name in settings.model_fields if name in asked})


def open_model(options: dict[str, Any]) -> tuple[Any, Sampling]:
    """The model that ``model_options`` name, and how its answers are drawn; what a user should know of both
    is said on standard error."""
    from rankfold.models.answering.sampling import told_of_own_settings
    from rankfold.models.base.load import load

    settings = asked_of(options, Sampling)
    base = load(asked_of(options, ModelRequest))
    for note in (*base.notes, *told_of_own_settings(base.model, settings)):
        click.echo(f"note: {note}", err=True)
    return base, settings
