"""How much an adapter can hold, beside how much its rows tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

BITS_A_NUMBER = 2.0  # what a trained number can hold of facts (Allen-Zhu & Li 2024, arXiv 2404.05405)
SENSIBLE_RANK = 256  # above it an adapter loses what speaks for it
MEGA = 1e6


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """An adapter of ``rank`` with ``numbers`` that are trained, and rows of ``tokens`` trained tokens, each
    of which surprises the model by ``loss`` nats before the run.

    A rule of thumb: knowledge that was held at most, measured on models trained for long on facts alone.  A
    run of a few passes holds less."""

    rank: int
    numbers: int
    tokens: int
    loss: float

    @property
    def bits_a_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def told(self) -> float:
        """Bits that the rows tell."""
        return self.tokens * self.bits_a_token

    @property
    def held(self) -> float:
        """Bits that the adapter can hold."""
        return self.numbers * BITS_A_NUMBER

    @property
    def share(self) -> float:
        """Of what the rows tell, how much can be held."""
        return min(1.0, self.held / self.told) if self.told else 1.0

    @property
    def rank_for_all(self) -> int:
        """The rank, a power of 2, that can hold all of it."""
        least = max(1.0, self.rank * self.told / self.held)
        return int(2 ** math.ceil(math.log2(least)))

    @property
    def sentence(self) -> str:
        numbers = (
            f"{self.tokens:,} trained tokens of {self.bits_a_token:.1f} bits; the adapter holds up to "
            f"{self.held / MEGA:.2f} Mbit"
        )
        return f"{numbers}: enough" if self.share == 1 else f"{numbers}: {self.share:.0%} of it"

    @property
    def advice(self) -> str:
        """What to do where the rows tell more than the adapter can hold; empty if they do not."""
        if self.share == 1:
            return ""
        rows, adapter = f"the rows tell {self.told / MEGA:.1f} Mbit", f"an adapter of rank {self.rank}"
        told = f"{rows}, and {adapter} holds {self.share:.0%}; if every row's facts are to be kept,"
        if self.rank_for_all <= SENSIBLE_RANK:
            return f"{told} rank {self.rank_for_all} has room for them"
        return (
            f"{told} training all weights is the better tool: LoRA will learn how the rows are written and "
            "what they have in common"
        )
