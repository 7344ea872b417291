"""How likely rows are to a model: the loss of each trained token, and of each row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.data.order.batch import Batch
from rankfold.data.order.batches import micro_batch_tokens
from rankfold.data.order.batching import padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.kernels.cross_entropy import CHUNK_LOGITS
from rankfold.models.messages.images import ImageReader
from rankfold.models.running.head import output_head
from rankfold.processes import Processes

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


def token_losses(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats of each of the batch's targets, in their order: (trained tokens).

    Only trained tokens reach the output head, and a chunk of them at a time: on short chats the prompt is
    half of the tokens, and the head a good part of a small model's work.  Where the head cannot be used by
    itself (``output_head`` says why), the columns that some row trains reach it, all at once."""
    wanted = batch.targets.tokens
    head = output_head(model, _text_of(batch))
    if isinstance(head, str):
        logits = _logits(model, batch).float()
        return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing)
    hidden = head.hidden_states(model, batch.inputs).flatten(0, 1)
    return head.losses(hidden.index_select(0, batch.targets.places), wanted, label_smoothing)


@torch.no_grad()
def target_logits(model: Any, batch: Batch) -> Iterator[Tensor]:
    """The logits at the batch's targets in float32, some (tokens, vocabulary) at a time, in their order."""
    head = output_head(model, _text_of(batch))
    if isinstance(head, str):
        yield _logits(model, batch).float()
        return
    hidden = head.hidden_states(model, batch.inputs).flatten(0, 1).index_select(0, batch.targets.places)
    for part in hidden.split(max(1, CHUNK_LOGITS // head.vocabulary)):
        yield head.form.logits(head.module(part))


def _text_of(batch: Batch) -> dict[str, Tensor]:
    return {name: batch.inputs[name] for name in TEXT_INPUTS if name in batch.inputs}


def _logits(model: Any, batch: Batch) -> Tensor:
    """The logits at the targets' places: (trained tokens, vocabulary)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    length = batch.inputs["input_ids"].shape[1]
    row, column = batch.targets.places // length, batch.targets.places % length
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        found: Tensor = model(**batch.inputs, use_cache=False).logits[row, column]
        return found
    columns = torch.unique(column)
    kept: Tensor = model(**batch.inputs, logits_to_keep=columns, use_cache=False).logits
    return kept[row, torch.searchsorted(columns, column)]


@torch.no_grad()
def row_losses(
    model: Any,
    rows: Sequence[EncodedRow],
    pad_id: int,
    processes: Processes | None = None,
    reader: ImageReader | None = None,
) -> Tensor:
    """The summed loss of each row in nats, float64, in the order of ``rows``; each of the ``processes`` works
    on its share, and all get the result.  ``reader`` is needed if rows have images."""
    processes = processes or Processes()
    batching = padded(reader, micro_batch_tokens(model.device))
    was_training = model.training
    model.eval()
    places = {id(row): place for place, row in enumerate(rows)}
    sums = torch.zeros(len(rows), dtype=torch.float64)
    groups = batching.cut(rows)
    rounds = -(-len(groups) // processes.count)  # all do as many forwards: see Trainer._own_micro_batches
    for number in range(rounds):
        place = number * processes.count + processes.index
        group = groups[min(place, len(groups) - 1)]
        batch = batching.collate(group, pad_id, model.device)
        losses = (token_losses(model, batch) * batch.targets.weights).double().cpu()
        if place < len(groups):
            of_group = torch.tensor([places[id(row)] for row in group])
            sums.index_add_(0, of_group[batch.targets.rows.cpu()], losses)
    model.train(was_training)
    return processes.sum(sums.to(processes.device)).cpu()
