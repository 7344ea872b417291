"""How an export looks in a terminal."""

from __future__ import annotations

from rich.console import Console

from rankfold.export.certificate import Certificate
from rankfold.export.hub import Parcel
from rankfold.export.run import CERTIFICATE, Exported


def print_exported(console: Console, done: Exported) -> None:
    for note in done.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    made = done.certificate
    if made is None:
        console.print("no certificate: nothing was asked", soft_wrap=True)
    else:
        console.print(f"certified by {made.engine}, by {made.positions} tokens of {made.prompts} answers:")
        for name, told in _lines(made).items():
            console.print(f"  {name:28} {told}", soft_wrap=True, highlight=False)
        console.print(f"certificate  {done.out / CERTIFICATE}", soft_wrap=True)
    console.print(f"written  {done.out}", soft_wrap=True)


def print_parcel(console: Console, parcel: Parcel, public: bool) -> None:
    """What would be sent, where, and under which licence."""
    seen = "everybody can see it" if public else "only you can see it (--public lets everybody)"
    console.print(f"to {parcel.repository} on the hub; {seen}:", soft_wrap=True, highlight=False)
    for name, size in parcel.files.items():
        console.print(f"  {size:>14,}  {name}", soft_wrap=True, highlight=False)
    licence = parcel.licence or "NOT NAMED; the base's holds, write it into README.md as license"
    console.print(f"base     {parcel.base}", soft_wrap=True, highlight=False)
    console.print(f"licence  {licence}", soft_wrap=True, highlight=False)


def _lines(made: Certificate) -> dict[str, str]:
    of = f"of {made.prompts}"
    lines = {
        "prompts as the same tokens": f"{made.tokens_equal} {of}",
        "answers the same": f"{made.answers_equal} {of}",
        "likeliest token the same": f"{made.same_likeliest:.1%}",
        "divergence": f"{made.mean_kl:.1e} nats a token; largest gap {made.largest_gap:.2g}",
        "loss of the rows' answers": f"base {made.base_loss:.4f}, tuned {made.tuned_loss:.4f}, written "
        f"{made.written_loss:.4f} nats a token",
    }
    if made.worst_layer:
        lines["rounding of the update"] = (
            f"{made.update_lost:.1%} of it in most layers, {made.worst_lost:.1%} in {made.worst_layer}"
        )
    if made.modules_tried:
        lines["modules used"] = f"{made.modules_tried} of {made.modules_tried}, each tried"
    return lines
