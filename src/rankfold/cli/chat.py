"""``rankfold chat``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import model_options, open_model
from rankfold.errors import DataError

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends"
IMAGE = "/image"
IMAGE_HELP = f"{IMAGE} FILE shows one with the next message"


@click.command("chat")
@model_options
def command(**options: Any) -> None:
    """Talk to a model, with an adapter or without.  Lines on standard input work too.

    A line "/image FILE" shows an image with the next message, to a model that sees images."""
    from rankfold.models.answering.answers import answerer

    base, settings = open_model(options)
    adapter = options["adapter"]
    interactive = sys.stdin.isatty()
    if interactive:
        told = HELP if base.processor is None else f"{IMAGE_HELP}, {HELP}"
        click.echo(f"{base.source.name}{f' with {adapter}' if adapter else ''}: {told}")
    with answerer(base, settings, at_once=1) as ready:
        _talk(base, ready, settings.seed, interactive)


def _talk(base: Any, ready: Any, seed: int, interactive: bool) -> None:
    from rankfold.models.messages.images import content_of

    messages: list[dict[str, Any]] = []
    images: list[Path] = []
    while (line := _ask(interactive)) is not None:
        if line == "/reset":
            messages, images = [], []
        elif line == IMAGE or line.startswith(f"{IMAGE} "):
            images += _shown(base, line.removeprefix(IMAGE).strip(), interactive)
        elif line:
            messages.append({"role": "user", "content": content_of(line, images)})
            images = []
            answer = ready.reply(messages, seed, _show)
            click.echo()
            messages.append({"role": "assistant", "content": answer})
            seed += 1  # otherwise a question asked again would draw the same random numbers again


def _ask(interactive: bool) -> str | None:
    """The next line, or None at the end."""
    try:
        line = input("you> " if interactive else "").strip()
    except (EOFError, KeyboardInterrupt):
        if interactive:
            click.echo()
        return None
    return None if line == "/quit" else line


def _shown(base: Any, name: str, interactive: bool) -> list[Path]:
    """The image that ``name`` is the file of.  Where it is none, someone who types is told, and an input that
    is piped in ends with DataError."""
    from rankfold.models.messages.images import size_of

    try:
        if not name:
            raise DataError(f"{IMAGE} wants the file of an image")
        if base.processor is None:
            raise DataError(f"{name}: {base.source.name} cannot see images")
        size_of(Path(name))
    except DataError as error:
        if not interactive:
            raise
        click.echo(f"error: {error}", err=True)
        return []
    return [Path(name)]


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
