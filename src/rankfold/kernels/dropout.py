"""Dropout whose mask is a number: drawn once, expanded wherever it is needed, never stored.

torch's ``bernoulli_`` draws one element after the other on a CPU that is not Intel's.  Here all elements
are drawn at once by integer operations that torch vectorises and spreads over its threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 1 << 16  # an element is kept if its 16 random bits are below a threshold
BITS = 64
# SplitMix64: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 20, with
# the constants of Vigna's splitmix64.c, as the signed numbers that torch's int64 wraps around.
GAMMA = 0x9E3779B97F4A7C15 - (1 << BITS)
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << BITS)), (27, 0x94D049BB133111EB - (1 << BITS)))
LAST_SHIFT = 31
WORD = 4  # elements
BLOCK = 1 << 18  # elements a thread: temporaries this small are used again, larger ones cost page faults


class DropMask(NamedTuple):
    """A mask of independent elements of which ``kept`` in 65,536 are kept.

    A probability is met to 2^-17 (half a level), and at least one level is kept and one dropped;
    ``rescale`` is the inverse of what is really kept, so that a dropped-out mean is exact."""

    seed: int
    kept: int

    @classmethod
    def draw(cls, probability: float) -> DropMask:
        """A fresh mask that drops with ``probability`` (0 < p < 1).

        Its seed comes from torch's CPU generator, so ``torch.manual_seed`` and whatever keeps or sets
        back that generator's state (checkpoints, activation checkpointing) decide the mask."""
        seed = int(torch.empty((), dtype=torch.int64).random_(-(1 << (BITS - 1)), None))
        return cls(seed, min(max(round((1 - probability) * LEVELS), 1), LEVELS - 1))

    @property
    def rescale(self) -> float:
        """What kept elements are multiplied by."""
        return LEVELS / self.kept

    def expand(self, like: Tensor) -> Tensor:
        """Ones where an element of ``like`` is kept, zeros elsewhere, in its shape and dtype, contiguous."""
        return self._expand(like, 0)

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """``expand(rows)`` of a matrix a few rows at a time, as (which rows, their mask); at least once."""
        wanted = BLOCK * torch.get_num_threads() // max(rows.shape[1], 1)
        step = max(wanted // WORD, 1) * WORD  # so that each block begins with a word
        for first in range(0, max(len(rows), 1), step):
            part = slice(first, first + step)
            yield part, self._expand(rows[part], first * rows.shape[1] // WORD)

    def _expand(self, like: Tensor, skip: int) -> Tensor:
        """The mask of ``like``, whose first element stands ``skip`` words after the mask's own first."""
        words = random_words(self.seed + skip * GAMMA, -(-like.numel() // WORD))
        bits = words.view(torch.int16)[: like.numel()]
        return bits.lt_(self.kept - LEVELS // 2).to(like.dtype).view(like.shape)


def random_words(seed: int, count: int) -> Tensor:
    """The first ``count`` numbers of SplitMix64 after the state ``seed``, as int64."""
    start = (seed + (1 << (BITS - 1))) % (1 << BITS) - (1 << (BITS - 1))  # as an int64 wraps around
    return mixed(torch.arange(1, count + 1).mul_(GAMMA).add_(start))


def mixed(words: Tensor) -> Tensor:
    """The numbers that SplitMix64 makes of its states ``words`` (int64), which are used up."""
    shifted = torch.empty_like(words)
    for shift, factor in ROUNDS:
        _xor_shifted(words, shift, shifted)
        words.mul_(factor)
    return _xor_shifted(words, LAST_SHIFT, shifted)


def _xor_shifted(words: Tensor, shift: int, spare: Tensor) -> Tensor:
    """``words ^= words >> shift`` with zeros moving in, which torch's shift does not do for a sign."""
    torch.bitwise_right_shift(words, shift, out=spare)
    return words.bitwise_xor_(spare.bitwise_and_((1 << (BITS - shift)) - 1))
