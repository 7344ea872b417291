"""The console that every verb prints to, and the proof of a mask on it."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

from rankfold.data.tokens.proof import MaskProof

PLAIN_WIDTH = 110


def make_console(stream: TextIO) -> Console:
    """A console for ``stream``: a terminal's own width, a fixed one elsewhere; never markup."""
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=False)


def print_proof(console: Console, proof: MaskProof) -> None:
    """Rows with trained and untrained tokens told apart: by colour, or by {+ +} where there is none."""
    coloured = console.is_terminal and not console.no_color
    how = "trained tokens are green" if coloured else "trained tokens stand in {+ +}"
    console.print(f"\nWhat is trained ({how}):", style="bold")
    for row in proof.shown:
        counts = f"{row.trained_tokens:,} of its {row.tokens:,} tokens trained"
        console.print(f"{row.origin}, {row.why}: {counts}", style="cyan")
        text = Text()
        for piece, trained in row.pieces:
            if coloured:
                text.append(piece, style="bold green" if trained else "dim")
            else:
                text.append(f"{{+{piece}+}}" if trained else piece)
        console.print(text)
        console.print()
