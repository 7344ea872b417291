"""``rankfold chat``"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import given, model_options

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends"


@click.command("chat")
@model_options
def command(adapter: Path | None, model: str | None, allow: tuple[Any, ...], **sampling: Any) -> None:
    """Talk to a model, with an adapter or without.  Lines on standard input work too."""
    from rankfold.models.generate import reply
    from rankfold.models.load import load
    from rankfold.models.sampling import Sampling

    settings = Sampling.of(given(sampling))
    base = load(adapter, model, allow)
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"{base.source.name}{f' with {adapter}' if adapter else ''}: {HELP}")
    messages: list[dict[str, str]] = []
    while (line := _ask(interactive)) is not None:
        if line == "/reset":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            answer = reply(base, messages, settings, _streamer(base.tokenizer))
            messages.append({"role": "assistant", "content": answer})
            # Otherwise a question asked again would draw the same random numbers again.
            settings = settings.model_copy(update={"seed": settings.seed + 1})


def _ask(interactive: bool) -> str | None:
    """The next line, or None at the end."""
    try:
        line = input("you> " if interactive else "").strip()
    except (EOFError, KeyboardInterrupt):
        if interactive:
            click.echo()
        return None
    return None if line == "/quit" else line


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
