"""What a run minimises.

An objective is a function: model and batch in, the sum of the losses and how many there are out.  The loop
knows nothing else of it, so that another one is another function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rankfold.data.tokens.encode import IGNORE
from rankfold.models.running.head import output_head

Batch = dict[str, Tensor]
Objective = Callable[[Any, Batch], tuple[Tensor, int]]

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


def supervised(model: Any, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The summed cross-entropy in nats of the trained tokens (a scalar), and their number.

    ``label_smoothing`` is the share of the target that is spread over the whole vocabulary (Szegedy et al.
    2016, arXiv 1512.00567, section 7)."""
    losses = token_losses(model, batch, label_smoothing)
    return losses.sum(), int((batch["labels"][:, 1:] != IGNORE).sum())


def token_losses(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats of each trained token, 0 elsewhere: (rows, columns that hold one); of a packed
    block (1, trained tokens).

    Only trained tokens reach the output head, and a chunk of them at a time: on short chats the prompt is
    half of the tokens, and the head a good part of a small model's work.  Where the head cannot be used by
    itself (``output_head`` says why), the columns that some row trains reach it, all at once."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    head = output_head(model, {name: inputs[name] for name in TEXT_INPUTS if name in inputs})
    if isinstance(head, str):
        logits = _logits(model, inputs, columns)
        return _cross_entropy(logits, targets[:, columns], label_smoothing)
    hidden = head.hidden_states(model, inputs)
    losses = head.losses(hidden.flatten(0, 1), targets.flatten(), label_smoothing)
    return losses.view(targets.shape)[:, columns]


def _logits(model: Any, inputs: dict[str, Tensor], columns: Tensor) -> Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        kept: Tensor = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    else:
        kept = model(**inputs, use_cache=False).logits[:, columns]
    return kept


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(targets.shape)
