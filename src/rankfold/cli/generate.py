"""``rankfold generate``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import model_options, open_model


@click.command("generate")
@click.option("--prompt", required=True, help="what to ask")
@click.option("--system", help="a system message to put before it")
@click.option(
    "--image", "images", type=Path, multiple=True, help="an image to show; may be given several times"
)
@model_options
def command(prompt: str, system: str | None, images: tuple[Path, ...], **options: Any) -> None:
    """Print the model's answer to one prompt.  The same seed gives the same answer."""
    from rankfold.models.answering.answers import reply
    from rankfold.models.messages.images import content_of

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content_of(prompt, images)})
    base, settings = open_model(options)
    click.echo(reply(base, messages, settings))
