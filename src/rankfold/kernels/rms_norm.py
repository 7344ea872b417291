"""Root-mean-square normalisation by a frozen weight as one autograd function."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (wide * inverse).to(x.dtype)
        is_wider = torch.promote_types(x.dtype, weight.dtype) != x.dtype
        return normed.mul(weight) if is_wider else normed.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """With g = grad * weight and s the inverse: ``s g - x s^3 mean(g x)``."""
        x, weight, inverse = ctx.saved_tensors
        wide = x.to(inverse.dtype)
        weighted = (grad * weight).to(inverse.dtype)
        share = torch.linalg.vecdot(weighted, wide).unsqueeze(-1)
        share.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return weighted.mul_(inverse).addcmul_(wide, share).to(x.dtype), None, None
