"""Whether what was written says what the tuned model says: asked of another program that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankfold.export.told import Said, Told

LEARNT = 0.02  # nats a token of the rows' own answers, from which on it is asked how much of them is kept
KEPT = 0.7  # of what was learnt


@dataclass
class Certificate:
    """What was compared on ``prompts`` prompts and ``positions`` positions of their answers.  ``mean_kl`` is
    that of the written model to the tuned one, in nats; ``same_likeliest`` the share of positions with one
    likeliest token; ``update_lost`` what rounding took of the adapter's change of a weight, to its length, in
    most layers.  ``base_loss``, ``tuned_loss`` and ``written_loss`` are nats a token of the rows' own
    answers.  Of ``modules_tried`` adapted modules the engine does not use those ``passed_over`` as we do.
    ``problems`` say why it does not hold."""

    format: str
    engine: str
    dtype: str
    most_kl: float
    prompts: int = 0
    positions: int = 0
    tokens_equal: int = 0
    answers_equal: int = 0
    ends_equal: int = 0
    largest_gap: float = 0.0
    mean_kl: float = 0.0
    same_likeliest: float = 1.0
    base_loss: float = 0.0
    tuned_loss: float = 0.0
    written_loss: float = 0.0
    update_lost: float = 0.0
    worst_lost: float = 0.0
    worst_layer: str = ""
    modules_tried: int = 0
    passed_over: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"version": 2, "holds": not self.problems} | asdict(self)

    @property
    def learnt(self) -> float:
        """By how many nats a token the adapter makes the rows' own answers likelier."""
        return self.base_loss - self.tuned_loss

    @property
    def kept(self) -> float | None:
        """The share of ``learnt`` that what was written has; None where it is too little to be told."""
        return (self.base_loss - self.written_loss) / self.learnt if self.learnt >= LEARNT else None


def compare(made: Certificate, told: Iterable[Told], said: Iterable[Said]) -> Certificate:
    """Fill in ``made`` with what was ``said`` to the prompts of ``told``."""
    kl = same = 0.0
    own = 0
    for each, other in zip(told, said, strict=True):
        made.tokens_equal += other.ids == each.ids
        made.answers_equal += other.answer == each.answer
        made.ends_equal += other.ended == each.ended or other.answer != each.answer
        made.largest_gap = max(made.largest_gap, float((other.logprobs - each.logprobs).abs().max()))
        kl += float((each.logprobs.exp() * (each.logprobs - other.logprobs)).sum())
        same += float((other.logprobs.argmax(-1) == each.logprobs.argmax(-1)).sum())
        made.positions += len(each.answer)
        made.prompts += 1
        own += len(each.own)
        made.base_loss += each.base_loss
        made.tuned_loss += each.own_loss
        made.written_loss += other.own_loss
    if made.positions:
        made.mean_kl, made.same_likeliest = kl / made.positions, same / made.positions
    for name in ("base_loss", "tuned_loss", "written_loss"):
        setattr(made, name, getattr(made, name) / max(own, 1))
    made.problems = _problems(made)
    return made


def _problems(made: Certificate) -> list[str]:
    kept = made.kept
    wrong = {
        f"{made.prompts - made.tokens_equal} of {made.prompts} prompts become other tokens": made.tokens_equal
        < made.prompts,
        f"{made.prompts - made.ends_equal} of {made.prompts} answers end elsewhere": made.ends_equal
        < made.prompts,
        f"its likelihoods are {made.mean_kl:.2g} nats a token from the tuned model's, and {made.dtype} "
        f"explains {made.most_kl:g}": not made.mean_kl <= made.most_kl,
        f"of the {made.learnt:.3f} nats a token that the adapter has learnt of these rows it keeps "
        f"{kept or 0:.0%}: the update does not survive {made.dtype}": kept is not None and kept < KEPT,
    }
    lost = [f"{made.engine} does not use the adapter's {path}" for path in made.passed_over]
    return [*(text for text, holds in wrong.items() if holds), *lost]


def sums_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` by its name there."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found
