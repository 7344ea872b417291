"""The ``rankfold`` command: finds the verb, and turns errors into a sentence and an exit status."""

from __future__ import annotations

import importlib
import keyword
import os
import sys

import click

from rankfold import __version__
from rankfold.errors import RankfoldError, TrainingError

USER_MISTAKE = 2
RUN_STOPPED = 3
INTERRUPTED = 130

# Each verb is the click command called ``command`` in the module of its name.
VERBS = {
    "demo": "fine-tune a small model on cold jokes, from start to finish",
    "check": "look at your rows before a run does",
    "plan": "tell what a run would take, from the config alone",
    "train": "fine-tune a model on your rows",
    "resume": "go on with a run that was stopped or killed",
    "selftest": "try rankfold's arithmetic on this installation",
    "schema": "print the JSON schema of a recipe",
    "chat": "talk to a model",
    "serve": "answer OpenAI's clients, many at a time",
    "generate": "answer one prompt",
    "predict": "answer every row of a file",
    "eval": "judge models and adapters on rows",
    "report": "put runs beside each other",
    "audit": "tell which training rows a model gives back word for word",
    "import": "turn another program's config into a recipe",
    "combine": "make one adapter of several",
    "export": "write an adapter as other programs use it, with a certificate",
    "doctor": "tell whether an adapter fits its base, and which programs can use it",
    "explain": "show with an SVD why a low rank can be enough",
}


class Verbs(click.Group):
    """Imports only the verb that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = importlib.import_module(f"rankfold.cli.{module}").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rankfold", message="%(prog)s %(version)s")
def cli() -> None:
    """LoRA fine-tuning you can trust, on the machine you have."""


def main() -> None:
    """Run the command; exit status 0, 1 for rows that would stop a run, 2 for a user's mistake, 3 for a
    run that was stopped before it could do harm, 130 for Ctrl-C and 143 for SIGTERM."""
    try:
        status = cli(prog_name="rankfold", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except RankfoldError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first tells it
            click.echo(f"error: {error}", err=True)
        status = RUN_STOPPED if isinstance(error, TrainingError) else USER_MISTAKE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
