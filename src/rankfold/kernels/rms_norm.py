"""Root-mean-square normalisation by a frozen weight as one autograd function."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankfold.kernels.forms import form_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension.

    Shapes: x (..., width), weight (width) -> (..., width), in the dtype of their product.  Computed in at
    least float32, and rounded to the dtype of x before the weight is multiplied, as transformers does it.
    For backward it keeps x and one number a row; the weight gets no gradient.
    Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4."""
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, eps = inputs
        out, inverse = form_of(x, weight).rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        return form_of(grad, x, weight).rms_norm_gradient(grad, x, weight, inverse), None, None
