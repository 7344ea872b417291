"""Cross-entropy behind an output head, without the logits of more than a chunk of tokens in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rankfold.kernels.forms import form_of
from rankfold.kernels.frozen import FrozenMatrix, product, transposed_product

CHUNK_LOGITS = 6 << 20  # of one chunk: 24 MB of float32, 128 tokens of a vocabulary of 49,152

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossForm:
    """What lies between a head's output and the loss: ``softcap * tanh(scale * output / softcap)``, or
    ``scale * output`` without a softcap, and then cross-entropy with label smoothing.

    Soft-capping: Gemma Team 2024 (arXiv 2408.00118), section 2; smoothing: Szegedy et al. 2015
    (arXiv 1512.00567), section 7."""

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether a head's output is the logits."""
        return self.scale == 1.0 and self.softcap is None

    def logits(self, output: Tensor) -> Tensor:
        """The logits (...) of a head's output (...), at least float32."""
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of ``logits`` by the head's output."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap).square())


PLAIN = LossForm()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | FrozenMatrix,
    targets: Tensor,
    bias: Tensor | None = None,
    form: LossForm = PLAIN,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The loss of each token in nats.

    Shapes: hidden (tokens, width), weight (vocabulary, width), targets (tokens), bias (vocabulary) ->
    (tokens), at least float32.  Where weight and bias are frozen, the gradient for ``hidden`` is made in the
    forward from the chunk's logits, as (tokens, width) for a loss of 1 each, and the backward scales its
    rows: exact for any weighting of the tokens, and two products in all.  A trained weight takes one product
    more: its chunks are computed anew in the backward.
    After Hsu et al. 2024 (arXiv 2410.10989), section 3.2, who fix the weighting in the forward."""
    tokens = chunk_tokens or max(1, CHUNK_LOGITS // weight.shape[0])
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias)):
        return head_cross_entropy(hidden, partial(product, weight=weight, bias=bias), targets, form, tokens)

    apply: Any = _FrozenHead.apply
    losses: Tensor = apply(hidden, weight, bias, _chunks(targets, tokens), form)
    return losses


def head_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    form: LossForm = PLAIN,
    chunk_tokens: int = 128,
) -> Tensor:
    """``linear_cross_entropy`` behind any ``head`` from (tokens, width) to (tokens, vocabulary): adapted,
    trained or quantised.  Its chunks are computed anew in the backward, which costs a product."""

    def of_chunk(some: Tensor, wanted: Tensor) -> Tensor:
        logits = form.logits(head(some))
        return F.cross_entropy(logits, wanted, reduction="none", label_smoothing=form.label_smoothing)

    parts = zip(*(_chunks(t, chunk_tokens) for t in (hidden, targets)), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])
    return torch.cat([of_chunk(*part) for part in parts])


def _chunks(tensor: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """As few pieces of at most ``tokens`` as it takes, of like length: a short one makes a slow product."""
    return tensor.chunk(max(1, -(-len(tensor) // tokens)))


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | FrozenMatrix,
        bias: Tensor | None,
        chunks: tuple[Tensor, ...],
        form: LossForm,
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        start = 0
        for targets in chunks:
            place = slice(start, start + len(targets))
            output = product(hidden[place], weight, bias)
            losses[place], by_output = _losses(output, targets, form, with_gradient=gradient is not None)
            if gradient is not None:
                narrow = by_output if isinstance(weight, Tensor) else by_output.to(hidden.dtype)
                gradient[place] = transposed_product(narrow, weight)
            start = place.stop
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _losses(output: Tensor, targets: Tensor, form: LossForm, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses (tokens) and their derivatives by the head's output (tokens, vocabulary)."""
    logits = output if form.is_plain else form.logits(output)
    slope = form.slope(logits) if with_gradient and not form.is_plain else None
    losses, gradient = form_of(logits).losses(logits, targets, form.label_smoothing, with_gradient)
    return losses, gradient if slope is None else gradient.mul_(slope)
