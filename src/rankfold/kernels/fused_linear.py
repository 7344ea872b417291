"""A linear layer with its low-rank update as one autograd function."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.compat import looked_into
from rankfold.errors import TrainingError
from rankfold.kernels.dropout import DropMask
from rankfold.kernels.forms import form_of
from rankfold.kernels.frozen import FrozenMatrix, product, transposed_product

DEVICES = ("cpu", "cuda", "meta")  # the last to count what a forward keeps
CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast makes its own dtype
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fused_linear(
    x: Tensor,
    base: tuple[Tensor | FrozenMatrix, Tensor | None],
    factors: tuple[Tensor, Tensor],
    scale: float,
    mask: DropMask | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + scale * drop(x) A^T B^T`` (..., out), in the dtype of W, or where W is no tensor, in
    that of x or of autocast.  With ``up`` (as x), silu(x) * up stands in x's place, and is made again in the
    backward instead of being kept (SwiGLU; Shazeer 2020, arXiv 2002.05202).

    Shapes: x (..., in), base W (out, in) and bias (out), factors A (rank, in) and B (out, rank).  For
    backward it keeps x, W, A, B, which exist anyway (under autocast what is not in that dtype is kept as it
    is cast), and the narrow product (rank, rows); a mask is expanded again.  Every wide sum is made in
    place, and what has no gradient is not computed.
    Ask ``can_fuse`` first.  Hu et al. 2021 (arXiv 2106.09685), section 4.1, and its derivatives."""
    out = _FusedLinear.apply(x, up, *base, *factors, scale, mask)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


def can_fuse(x: Tensor, weight: Tensor | FrozenMatrix, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether ``fused_linear`` may stand in for the separate operations.

    Not for tensors of other kinds, for several dtypes unless autocast would make them W's, and in what looks
    into an autograd function or cannot: compiling, tracing, functorch's transforms, forward-mode
    derivatives."""
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and not x.is_nested
        and x.device.type in DEVICES
        and _computed_in(x, weight, lora_a, lora_b) in _possible(weight)
        and not looked_into()
    )


def _possible(weight: Tensor | FrozenMatrix) -> tuple[torch.dtype, ...]:
    if not isinstance(weight, Tensor):
        return FLOATS
    return (weight.dtype,) if weight.dtype in FLOATS else ()


def _computed_in(x: Tensor, weight: Tensor | FrozenMatrix, *factors: Tensor) -> torch.dtype | None:
    """The dtype in which the separate operations would be computed, or None if in several."""
    device = x.device.type
    tensors = [x, *factors, *([weight] if isinstance(weight, Tensor) else [])]
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if dtypes <= {*CAST} else None
    return dtypes.pop() if len(dtypes) == 1 else None


class _FusedLinear(torch.autograd.Function):
    """The skinny products are written so that the short side comes first, as (rank, rows): with the long
    side first BLAS takes up to five times as long.  Gradients have the dtypes of what they are of."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, up, weight, bias, lora_a, lora_b, scale, mask = inputs
        ctx.dtypes = x.dtype, lora_a.dtype, lora_b.dtype
        ctx.weight = None if isinstance(weight, Tensor) else weight
        dtype = _computed_in(x, weight, lora_a, lora_b)
        x, lora_a, lora_b = (tensor.to(dtype) for tensor in (x, lora_a, lora_b))
        up = None if up is None else up.to(dtype)
        rows = _rows(x, up)
        ctx.factor = scale if mask is None else scale * mask.rescale
        ctx.mask = mask
        out = product(rows, weight, bias)
        narrow = _narrow(rows, lora_a, mask)
        out.addmm_(narrow.t(), lora_b.t(), alpha=ctx.factor)
        ctx.shape, (need_x, need_up, need_weight, _, need_a, *_) = x.shape, ctx.needs_input_grad
        # Where neither A nor W is trained nothing but the narrow product is asked for (LoRA-FA; Zhang et al.
        # 2023, arXiv 2308.03303, section 3.2); a gate is, if gate or up has a gradient.
        kept = need_weight or need_a or (up is not None and (need_x or need_up))
        held = (x, up) if kept else (None, None)
        ctx.save_for_backward(*held, weight if ctx.weight is None else None, lora_a, lora_b, narrow)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Can be differentiated again: with ``create_graph`` the narrow product is made anew."""
        x, up, weight, lora_a, lora_b, narrow = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight
        need_x, need_up, need_weight, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        need_x = need_x or need_up
        of_x, of_a, of_b = ctx.dtypes
        rows, grad = None if x is None else _rows(x, up), grads[0].reshape(-1, weight.shape[0])
        if torch.is_grad_enabled():
            if rows is None:
                raise TrainingError("with lora_A frozen there is no second derivative: its input is not kept")
            narrow = _narrow(rows, lora_a, ctx.mask)
        narrow_grad = torch.mm(lora_b.t(), grad.t()).mul_(ctx.factor)
        grad_x = transposed_product(grad, weight) if need_x else None
        grad_a = torch.zeros_like(lora_a) if need_a else None
        _add_through_a(rows, lora_a, narrow_grad, ctx.mask, (grad_x, grad_a))
        grad_up = None
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
            grad_x, grad_up = (grad_x, None) if up is None else _through_gate(grad_x, x, up)
        return (
            None if grad_x is None else grad_x.to(of_x),
            None if grad_up is None else grad_up.to(of_x),
            torch.mm(grad.t(), cast(Tensor, rows)) if need_weight else None,
            grad.sum(0) if need_bias else None,
            None if grad_a is None else grad_a.to(of_a),
            torch.mm(narrow, grad).mul_(ctx.factor).t().contiguous().to(of_b) if need_b else None,
            None,
            None,
        )


def _rows(x: Tensor, up: Tensor | None) -> Tensor:
    """The layer's input as a matrix."""
    if up is not None:
        differentiable = torch.is_grad_enabled()
        x = F.silu(x) * up if differentiable else form_of(x, up).gated(x, up)
    return x.reshape(-1, x.shape[-1])


def _through_gate(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of silu(gate) * up."""
    if torch.is_grad_enabled():  # torch cannot differentiate silu_backward
        share = gate.sigmoid()
        return grad * up * share * (1 + gate * (1 - share)), grad * F.silu(gate)
    return form_of(grad, gate, up).gated_gradient(grad, gate, up)


def _narrow(rows: Tensor, lora_a: Tensor, mask: DropMask | None) -> Tensor:
    """``A drop(x)^T`` (rank, rows), before what is kept is rescaled."""
    if mask is None:
        return torch.mm(lora_a, rows.t())
    parts = [torch.mm(lora_a, (rows[part] * kept).t()) for part, kept in mask.blocks(rows)]
    return torch.cat(parts, dim=1)


def _add_through_a(
    rows: Tensor | None,
    lora_a: Tensor,
    narrow_grad: Tensor,
    mask: DropMask | None,
    sums: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add to ``sums`` (of x and of A), where they are wanted, the gradients that pass through A."""
    grad_x, grad_a = sums
    if mask is None:
        if grad_x is not None:
            grad_x.addmm_(narrow_grad.t(), lora_a)
        if grad_a is not None:
            grad_a.addmm_(narrow_grad, cast(Tensor, rows))
        return
    like = cast(Tensor, grad_x if rows is None else rows)
    for part, kept in mask.blocks(like) if rows is not None or grad_x is not None else ():
        arrived = narrow_grad[:, part]
        if grad_a is not None:
            grad_a.addmm_(arrived, cast(Tensor, rows)[part] * kept)
        if grad_x is not None:
            grad_x[part].addcmul_(torch.mm(arrived.t(), lora_a), kept)
