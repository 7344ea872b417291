"""Keys and values of rows of different lengths that are answered together, in memory that stays.

All rows end at the same column: a step writes one column for all of them, and what a model masks by the
distance of columns (windows, chunks) is masked rightly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from rankfold.models.answering.kept_prefixes import Prefix

GROWTH = 64  # columns beyond those needed, at least: each growth copies everything


class SlotLayer(CacheLayerMixin):
    """What one layer of a model keeps: keys and values (rows, groups, columns, width)."""

    keys: Tensor
    values: Tensor
    is_sliding = False  # all columns are there, and the masks hide what is outside of a window

    def __init__(self, slots: Slots, like: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.keys, self.values = (each[:0, :, :0] for each in (like.keys, like.values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the shapes are known."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a step behind each row, and give all that they see."""
        slots, rows = self.slots, len(key_states)
        start, end = slots.start, slots.end + key_states.shape[2]
        self.keys[:rows, :, slots.end : end] = key_states
        self.values[:rows, :, slots.end : end] = value_states
        return self.keys[:rows, :, start:end], self.values[:rows, :, start:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots.end - self.slots.start

    def get_max_length(self) -> int:
        return -1

    def lay(self, rows: int, columns: int, end: int) -> None:
        """Move to memory of ``rows`` and ``columns``, where the rows end at ``end``."""
        slots = self.slots
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            held = old[:, :, slots.start : slots.end]
            new[: len(old), :, end - held.shape[2] : end] = held
            setattr(self, name, new)

    def put(self, place: int, keys: Tensor, values: Tensor) -> None:
        """Let row ``place`` be ``keys`` and ``values`` (groups, tokens, width), with zeros before them: what
        is masked must be a number all the same."""
        end = self.slots.end
        for held, given in ((self.keys, keys), (self.values, values)):
            held[place, :, : end - given.shape[1]] = 0
            held[place, :, end - given.shape[1] : end] = given


class Slots:
    """Rows of so many tokens as ``lengths`` says, which end at column ``end``; ``cache`` is what a model
    takes as ``past_key_values`` for one token more of each."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.end = 0
        self.cache: Any = Cache(layers=[])

    @property
    def start(self) -> int:
        """The first column that a row uses."""
        return self.end - max(self.lengths, default=0)

    @property
    def column_bytes(self) -> int:
        """What a token of one row takes; 0 as long as that is not known."""
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)

    def mask(self, width: int, device: Any) -> Tensor:
        """What the next ``width`` tokens of each row see, themselves too: (rows, columns)."""
        columns = torch.arange(self.start, self.end + width, device=device)
        return (columns >= self.end - torch.tensor(self.lengths, device=device)[:, None]).long()

    def advance(self) -> None:
        """The first column behind the rows counts from now on."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def add(self, filled: Any, row: int, begin: int, end: int) -> None:
        """A row more: the columns from ``begin`` to ``end`` of one of ``filled``."""
        if not self.cache.layers:
            self.cache = Cache(layers=[SlotLayer(self, like) for like in filled.layers])
        self.make_room(len(self.lengths) + 1, longest=end - begin)
        for layer, source in zip(self.cache.layers, filled.layers, strict=True):
            layer.put(len(self.lengths), source.keys[row, :, begin:end], source.values[row, :, begin:end])
        self.lengths.append(end - begin)

    def remove(self, place: int) -> None:
        """Let the last row stand in the place of row ``place``."""
        last, shown = len(self.lengths) - 1, slice(self.end - self.lengths[-1], self.end)
        if place != last:
            for layer in self.cache.layers:
                layer.put(place, layer.keys[last, :, shown], layer.values[last, :, shown])
            self.lengths[place] = self.lengths[last]
        del self.lengths[last]

    def make_room(self, rows: int, width: int = 1, longest: int = 0) -> None:
        """Have memory for ``rows`` rows, one of ``longest`` tokens, and for ``width`` tokens more of each."""
        held: Tensor = self.cache.layers[0].keys
        if len(held) >= rows and longest <= self.end <= held.shape[2] - width:
            return
        end = max(self.end - self.start, longest)
        rows = len(held) if len(held) >= rows else max(rows, 2 * len(held))
        for layer in self.cache.layers:
            layer.lay(rows, end + max(GROWTH, end // 2), end)
        self.end = end

    def prefix(self, place: int) -> Prefix:
        """What there is of the row ``place``: no copies."""
        shown = slice(self.end - self.lengths[place], self.end)
        return [(layer.keys[place, :, shown], layer.values[place, :, shown]) for layer in self.cache.layers]


def begun(prefixes: Sequence[tuple[Prefix, int]]) -> DynamicCache:
    """For each row the first tokens of a prefix, so many as are told, all ending at one column."""
    width, found = max(tokens for _, tokens in prefixes), DynamicCache()
    like = next(prefix for prefix, tokens in prefixes if tokens)
    for number, pair in enumerate(like):
        keys, values = (part.new_zeros(len(prefixes), part.shape[0], width, part.shape[2]) for part in pair)
        for row, (prefix, tokens) in enumerate(prefixes):
            if tokens:
                keys[row, :, width - tokens :] = prefix[number][0][:, :tokens]
                values[row, :, width - tokens :] = prefix[number][1][:, :tokens]
        found.update(keys, values, number)
    return found
