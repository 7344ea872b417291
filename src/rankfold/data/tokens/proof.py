"""The proof of a mask: rows as the model sees them, with what is trained told apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.data.tokens.cache import lengths_of, trained_counts
from rankfold.data.tokens.encode import EncodedRow, marked_pieces
from rankfold.errors import DataError
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.turn import turn_form


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row: why it is shown, its text in (text, trained) pieces, and its counts of tokens."""

    why: str
    origin: str
    pieces: list[tuple[str, bool]]
    trained_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class MaskProof:
    """Counts over all rows, and some rows to look at.

    ``stops``: the trained tokens that end an answer, as text, with how often each is trained."""

    rows: int
    tokens: int
    trained_tokens: int
    stops: dict[str, int]
    shown: list[ShownRow]


def prove_mask(rows: Sequence[EncodedRow], tokenizer: Any, show: int = 3, seed: int = 0) -> MaskProof:
    """Count what is trained in ``rows``; show ``show`` of them: the longest, the shortest, others by chance.

    Raises DataError if nothing is trained at all, or if no row trains a token that ends an answer: the model
    would not learn, or would not learn to stop."""
    stop_ids = sorted(turn_form(prompt_encoder(tokenizer)).stop_ids)
    trained, counts = trained_counts(rows, stop_ids)
    if not trained:
        raise DataError(
            f"none of the tokens of these {len(rows):,} rows is trained, so nothing would be learnt"
        )
    stops = {tokenizer.convert_ids_to_tokens(token): count for token, count in counts.items() if count}
    if not stops:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stop_ids))) or "none is known"
        raise DataError(
            f"no row trains a token that ends an answer ({names}), so the model would never learn to stop"
        )
    return MaskProof(
        rows=len(rows),
        tokens=sum(lengths_of(rows)),
        trained_tokens=trained,
        stops=stops,
        shown=[
            ShownRow(why, row.origin, marked_pieces(row, tokenizer), row.trained_tokens, len(row))
            for why, row in _chosen(rows, show, seed)
        ],
    )


def _chosen(rows: Sequence[EncodedRow], show: int, seed: int) -> list[tuple[str, EncodedRow]]:
    """The rows to show and why, each once."""
    lengths = lengths_of(rows)
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)
    chosen = {by_length[-1]: "longest"}
    chosen.setdefault(by_length[0], "shortest")
    others = [place for place in range(len(rows)) if place not in chosen]
    by_chance = random.Random(seed).sample(others, min(len(others), max(0, show - len(chosen))))
    chosen |= dict.fromkeys(by_chance, "by chance")
    return [(why, rows[place]) for place, why in list(chosen.items())[:show]]
