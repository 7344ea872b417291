"""Command-line options made from the fields of ``Recipe``, and the ones that verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rankfold.train.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def recipe_options(*left_out: str) -> Callable[[F], F]:
    """One ``--option`` for each field of ``Recipe``.  Values go on as text: the recipe checks them, so
    that all mistakes are told at once."""

    def decorate(function: F) -> F:
        for name, field in reversed(Recipe.model_fields.items()):
            if name in left_out:
                continue
            text = field.description or ""
            shown = "" if field.default is None or field.is_required() else f" [{field.default}]"
            function = click.option(
                f"--{name.replace('_', '-')}",
                name,
                default=None,
                metavar="VALUE",
                help=f"{text}{shown}{' (required)' if field.is_required() else ''}",
            )(function)
        return function

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def model_options(function: F) -> F:
    """``--adapter``, ``--model`` and how to sample."""
    for option in reversed(
        (
            click.option("--adapter", type=Path, help="adapter folder, such as a run's output folder"),
            click.option("--model", help="base model: folder, .gguf file or hub id [the adapter's]"),
            click.option("--max-new-tokens", type=click.IntRange(1, 100_000), default=128, show_default=True),
            click.option(
                "--temperature",
                type=click.FloatRange(0, 10),
                default=0.7,
                show_default=True,
                help="0 always takes the likeliest token",
            ),
            click.option(
                "--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True
            ),
            click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
        )
    ):
        function = option(function)
    return function
