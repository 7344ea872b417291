"""Prompts that are read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """What of prompts is to be read, padded behind its end where later tokens cannot be seen: ``ids`` and
    their ``positions`` (rows, tokens), and the ``mask`` (rows, known before and tokens).  ``ends`` are the
    places of the rows' last tokens, each once, and ``end_of`` says which of them is each row's."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    ends: list[int]
    end_of: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], known: Sequence[int], device: Any) -> Self:
        """``known``: of how many first tokens of each prompt keys and values are there, ending at one
        column."""
        new = [ids[tokens:] for ids, tokens in zip(prompts, known, strict=True)]
        longest, width = max(map(len, new)), max(known)
        ends = sorted({len(each) - 1 for each in new})
        mask = [
            [*[0] * (width - tokens), *[1] * (tokens + len(each)), *[0] * (longest - len(each))]
            for each, tokens in zip(new, known, strict=True)
        ]
        padded = [[*each, *[each[-1]] * (longest - len(each))] for each in new]
        begins = torch.tensor(known, device=device)[:, None]
        return cls(
            torch.tensor(padded, device=device),
            begins + torch.arange(longest, device=device),
            torch.tensor(mask, device=device),
            ends,
            [ends.index(len(each) - 1) for each in new],
        )

    def at_ends(self, logits: Tensor) -> Tensor:
        """Of logits (rows, ends, vocabulary) those at each row's own end."""
        return logits[torch.arange(len(logits)), torch.tensor(self.end_of)]
