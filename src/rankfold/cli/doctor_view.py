"""How an adapter's examination looks in a terminal."""

from __future__ import annotations

from rich.console import Console

from rankfold.export.doctor import Examination

SHOWN = 3  # lines of a program's reasons


def print_examination(console: Console, found: Examination) -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(f"base     {found.base}")
    say(f"modules  {len(found.bound)} have a pair here")
    for title, lines in (
        ("wrong", found.wrong),
        ("odd", found.odd),
        ("can be mended (--repair)", found.mended),
    ):
        if lines:
            say(f"\n{title}")
            for line in lines:
                say(f"  - {line}")
    say("\nwho can use it")
    for program, why in found.programs.items():
        first, *more = why.splitlines() or ["yes"]
        say(f"  {program:10} {'no: ' if why else ''}{first}")
        for line in more[:SHOWN]:
            say(f"  {'':10} {line}")
        if len(more) > SHOWN:
            say(f"  {'':10} ... and {len(more) - SHOWN} lines more")
