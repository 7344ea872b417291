"""What a run minimises.  The loop knows nothing else of it, so that another objective is another object."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.data.order.batch import Batch
from rankfold.models.running.head import output_head

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Objective(Protocol):
    def sum(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        """The sum of the losses of what the batch holds (a scalar), and how much that counts in the mean."""


@dataclass(frozen=True)
class Supervised:
    """The cross-entropy in nats of the trained tokens.

    ``label_smoothing`` is the share of the target that is spread over the whole vocabulary (Szegedy et al.
    2016, arXiv 1512.00567, section 7)."""

    label_smoothing: float = 0.0

    def sum(self, model: Any, batch: Batch) -> tuple[Tensor, float]:
        losses = token_losses(model, batch, self.label_smoothing)
        return (losses * batch.targets.weights).sum(), batch.targets.weight


def token_losses(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats of each of the batch's targets, in their order: (trained tokens).

    Only trained tokens reach the output head, and a chunk of them at a time: on short chats the prompt is
    half of the tokens, and the head a good part of a small model's work.  Where the head cannot be used by
    itself (``output_head`` says why), the columns that some row trains reach it, all at once."""
    wanted = batch.targets.tokens
    head = output_head(model, {name: batch.inputs[name] for name in TEXT_INPUTS if name in batch.inputs})
    if isinstance(head, str):
        logits = _logits(model, batch).float()
        return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing)
    hidden = head.hidden_states(model, batch.inputs).flatten(0, 1)
    return head.losses(hidden.index_select(0, batch.targets.places), wanted, label_smoothing)


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
