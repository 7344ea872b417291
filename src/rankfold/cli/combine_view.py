"""How a combination of adapters looks in a terminal."""

from __future__ import annotations

from rich.console import Console

from rankfold.models.adapters.combine import Combined


def print_combined(console: Console, done: Combined) -> None:
    """How alike the adapters are, what was made of them, and what is lost."""
    for (first, second), each in done.likenesses.items():
        console.print(f"{first} and {second}, over {each.modules} modules of both", soft_wrap=True)
        console.print(f"  cosine of their updates  {each.cosine:+.3f}")
        console.print(f"  directions both read     {each.read:.1%} (by chance {each.read_by_chance:.1%})")
        console.print(
            f"  directions both write    {each.written:.1%} (by chance {each.written_by_chance:.1%})"
        )
    for note in done.notes:
        console.print(f"note: {note}", soft_wrap=True)
    lost = f"{done.lost:.2%} of the update's norm is left out" if done.lost else "exact"
    console.print(f"{done.modules} modules of rank {done.rank}; {lost}", soft_wrap=True)
    console.print(f"written  {done.out}", soft_wrap=True)
