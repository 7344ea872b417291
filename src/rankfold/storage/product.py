"""Products with a matrix that is held in few bytes: it is expanded for them and never kept.

A slice of rows is expanded at a time, into memory that is used again and again, and multiplied before the
next one.  So the memory needed does not grow with the matrix, and a slice is still in the processor's
cache when it is multiplied.  Autograd keeps the bytes, which are there anyway, and expands them anew in
backward; the input is not kept, because a frozen weight has no gradient."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rankfold.storage.forms import Form, expand

SLICE = 1 << 22  # numbers of a matrix expanded at a time on a CPU: 16 MB of float32
SLICE_ON_DEVICE = 1 << 26  # on a GPU, where every launch costs as much as many numbers

_own = threading.local()


def held_linear(x: Tensor, held: Tensor, form: Form) -> Tensor:
    """``x W^T``, with a gradient for x; x (..., columns) -> (..., rows), in the dtype of x.

    ``held`` (rows, bytes of a row) holds W as ``form``; its numbers are rounded to the dtype of x."""
    return _HeldLinear.apply(x, held, form)  # type: ignore[no-any-return,no-untyped-call]


def held_transposed(grad: Tensor, held: Tensor, form: Form, columns: int) -> Tensor:
    """``grad W``, with a gradient for ``grad``: grad (..., rows) -> (..., columns), in its dtype."""
    return _HeldTransposed.apply(grad, held, form, columns)  # type: ignore[no-any-return,no-untyped-call]


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, held: Tensor, form: Form) -> Tensor:
        return multiply(x, held, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Form], output: Tensor) -> None:
        x, held, form = inputs
        ctx.save_for_backward(held)
        ctx.form, ctx.columns = form, x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (held,) = ctx.saved_tensors
        return held_transposed(grad, held, ctx.form, ctx.columns), None, None


class _HeldTransposed(torch.autograd.Function):
    """The gradient of the above, itself differentiable."""

    @staticmethod
    def forward(grad: Tensor, held: Tensor, form: Form, columns: int) -> Tensor:
        return multiply_transposed(grad, held, form, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Form, int], output: Tensor) -> None:
        _, held, form, _ = inputs
        ctx.save_for_backward(held)
        ctx.form = form

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (held,) = ctx.saved_tensors
        return held_linear(grad, held, ctx.form), None, None, None


@torch.no_grad()
def multiply(x: Tensor, held: Tensor, form: Form) -> Tensor:
    """``x W^T``: x (..., columns) -> (..., rows), without autograd."""
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_empty(len(flat), len(held))
    for rows, weight in _slices(held, form, x):
        torch.mm(flat, weight.t(), out=out[:, rows])
    return _shaped(out, x)


@torch.no_grad()
def multiply_transposed(grad: Tensor, held: Tensor, form: Form, columns: int) -> Tensor:
    """``grad W``: grad (..., rows) -> (..., columns), without autograd."""
    flat = grad.reshape(-1, grad.shape[-1])
    out = flat.new_zeros(len(flat), columns)
    for rows, weight in _slices(held, form, out):
        out.addmm_(flat[:, rows], weight)
    return _shaped(out, grad)


def _shaped(out: Tensor, like: Tensor) -> Tensor:
    """``out`` with the leading dimensions of ``like``; no view if it is a matrix, as those are added to."""
    return out if like.dim() == out.dim() else out.view(*like.shape[:-1], out.shape[-1])


def _slices(held: Tensor, form: Form, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``held`` slice by slice, with their numbers in the dtype of ``like`` (..., columns).

    The numbers of one slice are gone when the next is asked for."""
    columns = like.shape[-1]
    limit = SLICE if like.device.type == "cpu" else SLICE_ON_DEVICE
    count = max(1, -(-len(held) * columns // limit))
    step = -(-len(held) // count) or 1
    memory = _memory(step * columns, like)
    for start in range(0, len(held), step):
        part = held[start : start + step]
        numbers = memory[: len(part) * columns].view(len(part), columns)
        yield slice(start, start + len(part)), expand(part, form, numbers)


def _memory(numbers: int, like: Tensor) -> Tensor:
    """Memory for so many numbers.  On a CPU it is this thread's own, kept for the next time, because fresh
    memory costs a page fault each 4 KB; a GPU's allocator keeps its memory by itself."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(numbers, dtype=like.dtype, device=like.device)
    kept: dict[torch.dtype, Tensor] = _own.__dict__.setdefault("kept", {})
    if like.dtype not in kept or len(kept[like.dtype]) < numbers:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            kept[like.dtype] = torch.empty(numbers, dtype=like.dtype)
    return kept[like.dtype]
