"""Rotary positions as one autograd function, which keeps the angles alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.kernels.forms import form_of


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., heads, tokens, width) turned by its tokens' angles (..., 1, tokens, width), which get no
    gradient; see ``Form.rotated``."""
    return cast(Tensor, _Rotary.apply(x, cos, sin))  # type: ignore[no-untyped-call]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, cos, sin = inputs
        ctx.save_for_backward(cos, sin)
        return form_of(x, cos, sin).rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return form_of(grad, cos, sin).rotated_gradient(grad, cos, sin), None, None
