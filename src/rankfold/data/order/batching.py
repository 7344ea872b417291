"""Ways to put the rows of a step together: padded side by side, packed one after another, or with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from rankfold.data.order.batch import Batch, sent, targets_of
from rankfold.data.order.batches import MICRO_BATCH_TOKENS, MicroBatch, micro_batches
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import DataError
from rankfold.models.messages.images import ImageReader

Kind = Literal["packed", "padded"]


class Batching(Protocol):
    """How a step's rows become the batches of its forward passes, of at most ``tokens`` each, and why so."""

    kind: ClassVar[Kind]

    @property
    def reason(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    def cut(self, rows: Sequence[EncodedRow]) -> list[MicroBatch]:
        """``rows`` in groups, each for one forward."""

    def collate(self, rows: MicroBatch, pad_id: int, device: Any) -> Batch:
        """One group as the model takes it."""

    def size(self, rows: MicroBatch) -> int:
        """The tokens that the model computes for one group, the padding among them."""


@dataclass(frozen=True)
class Padded:
    """Rows of like length side by side, padded on the right."""

    reason: str = ""
    tokens: int = MICRO_BATCH_TOKENS
    kind: ClassVar[Kind] = "padded"

    def cut(self, rows: Sequence[EncodedRow]) -> list[MicroBatch]:
        return micro_batches(rows, self.tokens)

    def collate(self, rows: MicroBatch, pad_id: int, device: Any) -> Batch:
        """``input_ids`` and ``attention_mask``, each (rows, longest)."""
        longest = max(len(row) for row in rows)

        def padded(lists: list[list[int]], fill: int) -> Tensor:
            return sent(torch.tensor([ids + [fill] * (longest - len(ids)) for ids in lists]), device)

        inputs = {
            "input_ids": padded([row.input_ids for row in rows], pad_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }
        return Batch(inputs, targets_of(rows, range(0, len(rows) * longest, longest), device))

    def size(self, rows: MicroBatch) -> int:
        return len(rows) * max(map(len, rows))


@dataclass(frozen=True)
class Packed:
    """Rows one after another in blocks without padding, each row kept to itself."""

    reason: str = ""
    tokens: int = MICRO_BATCH_TOKENS
    kind: ClassVar[Kind] = "packed"

    def cut(self, rows: Sequence[EncodedRow]) -> list[MicroBatch]:
        return blocks(rows, self.tokens)

    def collate(self, rows: MicroBatch, pad_id: int, device: Any) -> Batch:
        """``input_ids`` and ``position_ids`` of one block, each (1, tokens).

        There is no attention mask: from its absence and from positions that start anew, transformers tells
        the rows apart (``transformers.masking_utils.find_packed_sequence_indices``)."""
        packed = {
            "input_ids": [token for row in rows for token in row.input_ids],
            "position_ids": [place for row in rows for place in range(len(row))],
        }
        inputs = {name: sent(torch.tensor([values]), device) for name, values in packed.items()}
        starts = [0, *accumulate(map(len, rows[:-1]))]
        return Batch(inputs, targets_of(rows, starts, device))

    def size(self, rows: MicroBatch) -> int:
        return sum(map(len, rows))


@dataclass(frozen=True, kw_only=True)
class PaddedImages(Padded):
    """Padded rows of which some have images, whose pixels ``reader`` reads when a batch is needed."""

    reader: ImageReader
    reason: str = "rows with images are padded"

    def collate(self, rows: MicroBatch, pad_id: int, device: Any) -> Batch:
        """Beside what padded rows have, the pixels of all images of ``rows`` and whatever else the model
        wants to know of them (``image_grid_thw``, say), under the names of the model's inputs.

        Raises DataError naming the row whose image can no longer be read."""
        batch = super().collate(rows, pad_id, device)
        if self.reader.type_name:
            longest = batch.inputs["input_ids"].shape[1]
            types = [self.reader.types(row.input_ids + [pad_id] * (longest - len(row))) for row in rows]
            batch.inputs[self.reader.type_name] = sent(torch.tensor(types), device)
        images = [image for row in rows for image in row.images]
        if not images:
            return batch
        try:
            pixels = self.reader.pixels(images)
        except DataError as error:
            origins = ", ".join(row.origin for row in rows if row.images)
            raise DataError(f"{origins}: {error}") from error
        batch.inputs.update({name: sent(value, device) for name, value in pixels.items()})
        return batch


def pad_id_of(tokenizer: Any) -> int:
    """The token that fills a batch up; what it is does not matter, as it is masked."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in found if token is not None))


def padded(reader: ImageReader | None, tokens: int) -> Padded:
    """Padded rows, with images where there is a ``reader`` for them."""
    return Padded(tokens=tokens) if reader is None else PaddedImages(reader=reader, tokens=tokens)


def blocks(rows: Sequence[EncodedRow], tokens: int = MICRO_BATCH_TOKENS) -> list[MicroBatch]:
    """Cut ``rows`` into blocks of at most ``tokens`` tokens; a longer row is a block of its own.

    First fit decreasing: at most 11/9 of the fewest possible blocks, and one more (Johnson 1973)."""
    packed: list[MicroBatch] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        place = next((at for at, left in enumerate(room) if len(row) <= left), None)
        if place is None:
            packed.append([row])
            room.append(tokens - len(row))
        else:
            packed[place].append(row)
            room[place] -= len(row)
    return packed
