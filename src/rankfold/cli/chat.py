"""``rankfold chat``"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankfold.cli.options import asked_of, several_model_options
from rankfold.errors import ConfigError, RankfoldError
from rankfold.models.answering.sampling import Sampling, told_of_own_settings
from rankfold.models.choices import ModelRequest

if TYPE_CHECKING:
    from rankfold.cli.chat_session import Speaking

LINES = '"""'  # around a message of several lines


@click.command("chat")
@click.option("--server", metavar="URL", help="talk to a running server: http://HOST:PORT/v1")
@several_model_options
def command(server: str | None, **options: Any) -> None:
    """Talk to a model, with adapters or without.  Lines on standard input work too.

    Give --adapter NAME=FOLDER several times to switch between them (/use NAME), to hear them side by side
    (/use NAME NAME), and the base (/base).  /help says what else there is."""
    sampling, told = asked_of(options, Sampling), asked_of(options, ModelRequest)
    adapters = named_adapters(options.pop("adapters"))
    if server is None:
        _talk_here(adapters, told, sampling)
        return
    if adapters or told != ModelRequest():
        raise ConfigError("a server has its models loaded: leave --adapter, --model and their like out")
    from rankfold.cli.chat_server import served_models

    _talk(served_models(server, sampling), sampling.seed, server)


def _talk_here(adapters: dict[str, Path], asked: ModelRequest, sampling: Sampling) -> None:
    from rankfold.cli.chat_session import Spoken
    from rankfold.models.answering.answers import Answerer, answerer
    from rankfold.models.base.several import BASE, load_several

    voices = load_several(adapters, asked)
    base = voices[BASE].base
    notes = dict.fromkeys(note for voice in voices.values() for note in voice.base.notes)
    for note in (*notes, *told_of_own_settings(base.model, sampling)):
        click.echo(f"note: {note}", err=True)
    with answerer(base, sampling, at_once=1):
        ready = {name: Spoken(voice, Answerer(voice.base, sampling, 1)) for name, voice in voices.items()}
        _talk(ready, sampling.seed, base.source.name)


def _talk(voices: Mapping[str, Speaking], seed: int, place: str) -> None:
    from rankfold.cli.chat_session import Session

    interactive = sys.stdin.isatty()
    session = Session(voices, seed, _show)
    if interactive:
        click.echo(f"{place}, answering: {session.speaking[0]}; /help says what can be typed")
    _take_lines(session.take, interactive)


def named_adapters(given: tuple[str, ...]) -> dict[str, Path]:
    """``NAME=FOLDER``, or a folder, which goes by its own name.  Raises ConfigError for one name twice."""
    found: dict[str, Path] = {}
    for each in given:
        name, mark, folder = each.partition("=")
        is_folder = not mark or Path(each).exists()
        name, folder = (Path(each).resolve().name, each) if is_folder else (name, folder)
        if name in (*found, "base", ""):
            raise ConfigError(f"--adapter {each}: the name {name!r} is taken; say NAME=FOLDER with another")
        found[name] = Path(folder)
    return found


def _take_lines(take: Callable[[str], None], interactive: bool) -> None:
    while (line := _read(interactive)) is not None:
        try:
            take(line)
        except RankfoldError as error:
            if not interactive:
                raise
            click.echo(f"error: {error}", err=True)


def _read(interactive: bool) -> str | None:
    """The next line, or those between two marks, or None at the end."""
    line = _line("you> " if interactive else "")
    if line is None or line.strip() == "/quit":
        return None
    if not line.lstrip().startswith(LINES):
        return line.strip()
    lines = [line.lstrip().removeprefix(LINES)]
    while not lines[-1].rstrip().endswith(LINES):
        more = _line("...  " if interactive else "")
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines).rstrip().removesuffix(LINES).strip("\n")


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        if prompt:
            click.echo()
        return None


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
