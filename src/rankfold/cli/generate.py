"""``rankfold generate``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rankfold.cli.options import given, model_options


@click.command("generate")
@click.option("--prompt", required=True, help="what to ask")
@click.option("--system", help="a system message to put before it")
@click.option(
    "--image", "images", type=Path, multiple=True, help="an image to show; may be given several times"
)
@model_options
def command(
    prompt: str,
    system: str | None,
    images: tuple[Path, ...],
    adapter: Path | None,
    model: str | None,
    allow: tuple[Any, ...],
    **sampling: Any,
) -> None:
    """Print the model's answer to one prompt.  The same seed gives the same answer."""
    from rankfold.models.base.load import load
    from rankfold.models.messages.images import content_of
    from rankfold.models.running.generate import reply
    from rankfold.models.running.sampling import Sampling, told_of_own_settings

    settings = Sampling.of(given(sampling))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content_of(prompt, images)})
    base = load(adapter, model, allow)
    for note in (*base.notes, *told_of_own_settings(base.model, settings)):
        click.echo(f"note: {note}", err=True)
    click.echo(reply(base, messages, settings))
