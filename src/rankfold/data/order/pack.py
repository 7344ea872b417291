"""Whether the rows of a step are packed or padded: whichever the model can take, and takes less work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rankfold.data.order.batches import (
    MICRO_BATCH_TOKENS,
    MicroBatch,
    epoch_order,
    epoch_steps,
    micro_batches,
)
from rankfold.data.order.batching import Batching, Kind, Packed, Padded, PaddedImages, blocks
from rankfold.data.tokens.cache import lengths_of
from rankfold.data.tokens.encode import EncodedRow
from rankfold.errors import ConfigError
from rankfold.models.messages.images import ImageReader
from rankfold.models.running.rows_apart import attend_rows_apart

SAMPLED_STEPS = 64  # of the first epoch, to count what either way would cost
LARGEST_STEPS = 16  # that are looked into for the largest micro-batch, by either measure
PROBE_TOKENS = 8  # of each of the two rows with which a model is tried
SAME = 1e-3  # of the largest logit: far above rounding in float32, far below what another row changes
ROUNDINGS = 8  # or so many times the rounding of the model's number format


def batching_of_images(reader: ImageReader, most: int, given: Kind | None = None) -> Batching:
    """Rows with images side by side, at most ``most`` tokens at once.  Raises ConfigError if packed is
    ``given``."""
    if given == "packed":
        raise ConfigError("rows with images cannot be packed; use --batching padded")
    return PaddedImages(reader=reader, tokens=most)


def choose_batching(
    model: Any,
    rows: Sequence[EncodedRow],
    rows_per_step: int,
    seed: int,
    given: Kind | None = None,
    most: int = MICRO_BATCH_TOKENS,
) -> Batching:
    """Packed or padded, at most ``most`` tokens at once, whichever takes less arithmetic with this ``model``
    (without its adapter) on these rows, or as ``given``.  Packed is chosen only if the model keeps packed
    rows apart, which is tried.  Unless padded is given, the model attends to packed rows one by one from then
    on, if it can.

    Raises ConfigError if packed is ``given`` and the model mixes the rows."""
    if given == "padded":
        return Padded("as given", most)
    masked = attend_rows_apart(model)
    if mixed := why_not_packed(model, rows[0]):
        if given == "packed":
            raise ConfigError(f"rows cannot be packed: {mixed}; use --batching padded")
        return Padded(mixed, most)
    if given == "packed":
        return Packed("as given", most)
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
    return (Packed if costs[1] <= costs[0] else Padded)(f"{ratio} their arithmetic", most)


def largest_step(
    rows: Sequence[EncodedRow], batching: Batching, rows_per_step: int, seed: int
) -> list[EncodedRow]:
    """The rows of the step of the first epoch with the largest micro-batch, padding and all.

    Only those steps are looked into that have the longest rows or the most tokens."""
    lengths = lengths_of(rows)

    def longest(step: list[int]) -> int:
        return max(lengths[place] for place in step)

    steps = epoch_order(lengths, rows_per_step, seed, 0)
    likely = sorted(steps, key=lambda step: len(step) * longest(step))[-LARGEST_STEPS:]
    likely += sorted(steps, key=longest)[-LARGEST_STEPS:]
    return max(([rows[place] for place in step] for step in likely), key=partial(largest_size, batching))


def largest_size(batching: Batching, step: Sequence[EncodedRow]) -> int:
    """The tokens of the largest micro-batch of a step."""
    return max(map(batching.size, batching.cut(step)))


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
        inputs = Packed().collate(group, 0, model.device).inputs
        seen: Tensor = model(**inputs, use_cache=False).logits[0].float()
        return seen

    with torch.no_grad():
        alone = torch.cat([logits([piece]) for piece in pieces])
        difference = (logits(pieces) - alone).abs().max() / alone.abs().max()
    if difference > max(SAME, ROUNDINGS * torch.finfo(model.dtype).eps):
        return f"the model lets packed rows see each other (logits differ by {float(difference):.1%})"
    return ""
