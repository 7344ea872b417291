"""Packing: the rows of a step one after another in blocks without padding, each row kept to itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.data.order.batches import (
    MICRO_BATCH_TOKENS,
    MicroBatch,
    collate,
    epoch_steps,
    micro_batch_tokens,
    micro_batches,
)
from rankfold.data.order.image_batches import collate_images
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.messages.images import ImageReader
from rankfold.models.running.rows_apart import attend_rows_apart

Kind = Literal["packed", "padded"]

SAMPLED_STEPS = 64  # of the first epoch, to count what either way would cost
PROBE_TOKENS = 8  # of each of the two rows with which a model is tried
SAME = 1e-3  # of the largest logit: far above rounding in float32, far below what another row changes
ROUNDINGS = 8  # or so many times the rounding of the model's number format


@dataclass(frozen=True)
class Batching:
    """How a step's rows become the batches of its forward passes, of at most ``tokens`` each, and why so;
    ``reader`` is there if rows may have images, which are never packed."""

    kind: Kind = "padded"
    reason: str = ""
    tokens: int = MICRO_BATCH_TOKENS
    reader: ImageReader | None = None

    def cut(self, rows: Sequence[EncodedRow]) -> list[MicroBatch]:
        return (blocks if self.kind == "packed" else micro_batches)(rows, self.tokens)

    def collate(self, rows: MicroBatch, pad_id: int, device: Any) -> dict[str, Tensor]:
        if self.reader is not None:
            return collate_images(rows, pad_id, device, self.reader)
        return collate_packed(rows, device) if self.kind == "packed" else collate(rows, pad_id, device)


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


def collate_packed(rows: MicroBatch, device: Any) -> dict[str, Tensor]:
    """``input_ids``, ``position_ids`` and ``labels`` of one block, each (1, tokens).

    There is no attention mask: from its absence and from positions that start anew, transformers tells
    the rows apart (``transformers.masking_utils.find_packed_sequence_indices``).  A row's first token is
    never trained, as the token before it is another row's."""
    packed = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "position_ids": [place for row in rows for place in range(len(row))],
        "labels": [label for row in rows for label in (IGNORE, *row.labels[1:])],
    }
    return {name: torch.tensor([values], device=device) for name, values in packed.items()}


def batching_of_images(reader: ImageReader, device: torch.device, given: Kind | None = None) -> Batching:
    """Rows with images side by side.  Raises ConfigError if packed is ``given``."""
    if given == "packed":
        raise ConfigError("rows with images cannot be packed; use --batching padded")
    return Batching("padded", "rows with images are padded", micro_batch_tokens(device), reader)


def choose_batching(
    model: Any, rows: Sequence[EncodedRow], rows_per_step: int, seed: int, given: Kind | None = None
) -> Batching:
    """Packed or padded, whichever takes less arithmetic with this ``model`` (without its adapter) on these
    rows, or as ``given``.  Packed is chosen only if the model keeps packed rows apart, which is tried.
    Unless padded is given, the model attends to packed rows one by one from then on, if it can.

    Raises ConfigError if packed is ``given`` and the model mixes the rows."""
    most = micro_batch_tokens(model.device)
    if given == "padded":
        return Batching("padded", "as given", most)
    masked = attend_rows_apart(model)
    if mixed := why_not_packed(model, rows[0]):
        if given == "packed":
            raise ConfigError(f"rows cannot be packed: {mixed}; use --batching padded")
        return Batching("padded", mixed, most)
    if given == "packed":
        return Batching("packed", "as given", most)
    steps = list(islice(epoch_steps(rows, rows_per_step, seed), SAMPLED_STEPS))
    padded = [(len(group), max(map(len, group))) for step in steps for group in micro_batches(step, most)]
    if masked:
        packed = [(1, sum(map(len, group))) for step in steps for group in blocks(step, most)]
    else:
        packed = [(1, len(row)) for step in steps for row in step]
    costs = [operations(model, shapes) for shapes in (padded, packed)]
    tokens = sum(map(len, (row for step in steps for row in step)))
    waste = 1 - tokens / sum(count * length for count, length in padded)
    ratio = (
        f"{waste:.1%} of padded batches is padding, and packed blocks take {costs[1] / costs[0]:.2f} times"
    )
    return Batching("packed" if costs[1] <= costs[0] else "padded", f"{ratio} their arithmetic", most)


def operations(model: Any, shapes: list[tuple[int, int]]) -> float:
    """Multiplications and additions of a forward over batches of (rows, length): two for each weight and
    token, and the attention of each token to every token of its row, or of its block where that is masked,
    since the hidden pairs are computed too (Kaplan et al. 2020, arXiv 2001.08361, table 1).  The head is
    left out: it sees as many trained tokens either way."""
    config = model.config.get_text_config()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    left_out = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in left_out)
    width = config.num_hidden_layers * config.hidden_size
    return float(sum(rows * length * (2 * weights + 4 * width * length) for rows, length in shapes))


def why_not_packed(model: Any, row: EncodedRow) -> str:
    """Why ``model`` cannot take packed rows, or an empty string.  Two pieces of ``row`` are tried, alone
    and packed: the logits must be the same."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "the model takes no position_ids, by which packed rows are told apart"
    ids = row.input_ids[: 2 * PROBE_TOKENS]
    pieces = [EncodedRow("", part, part) for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]) if part]

    def logits(group: MicroBatch) -> Tensor:
        batch = collate_packed(group, model.device)
        del batch["labels"]
        seen: Tensor = model(**batch, use_cache=False).logits[0].float()
        return seen

    with torch.no_grad():
        alone = torch.cat([logits([piece]) for piece in pieces])
        difference = (logits(pieces) - alone).abs().max() / alone.abs().max()
    if difference > max(SAME, ROUNDINGS * torch.finfo(model.dtype).eps):
        return f"the model lets packed rows see each other (logits differ by {float(difference):.1%})"
    return ""
