"""Keys and values of prompts that were answered: what comes next may begin like one of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

# Of each layer the keys and the values (groups, tokens, width) of a row's first tokens.
Prefix = list[tuple[Tensor, Tensor]]
MOST = 64  # that are compared with each prompt


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What ``adapter`` made of ``ids``."""

    adapter: str | None
    ids: list[int]
    prefix: Prefix

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.prefix for tensor in pair)


class KeptPrefixes:
    """The last ones, in no more than ``most_bytes``."""

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.all: deque[Kept] = deque()

    def add(self, adapter: str | None, ids: list[int], prefix: Prefix) -> None:
        """Keep a copy of ``prefix``, the newest, instead of those that it begins with."""
        size = sum(tensor.nbytes for pair in prefix for tensor in pair)
        if size > self.most_bytes:
            return
        for old in [old for old in self.all if old.adapter == adapter and ids[: len(old.ids)] == old.ids]:
            self._forget(old)
        while len(self.all) >= MOST or self.bytes + size > self.most_bytes:
            self._forget(self.all[0])
        self.all.append(Kept(adapter, ids, [(keys.clone(), values.clone()) for keys, values in prefix]))
        self.bytes += size

    def forget(self, adapter: str | None) -> None:
        for old in [old for old in self.all if old.adapter == adapter]:
            self._forget(old)

    def _forget(self, old: Kept) -> None:
        self.all.remove(old)
        self.bytes -= old.bytes
