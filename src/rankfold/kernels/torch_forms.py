"""The kernels by torch's operations: for every device and number format, and what others are held against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.compat import softmax_gradient

NAME = "torch"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (wide * inverse).to(x.dtype)
    is_wider = torch.promote_types(x.dtype, weight.dtype) != x.dtype
    return normed.mul(weight) if is_wider else normed.mul_(weight), inverse


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    wide = x.to(inverse.dtype)
    weighted = (grad * weight).to(inverse.dtype)
    share = torch.linalg.vecdot(weighted, wide).unsqueeze(-1)
    share.mul_(inverse.pow(3)).div_(-x.shape[-1])
    return weighted.mul_(inverse).addcmul_(wide, share).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def gated_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    by_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), by_up


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotated_gradient(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (grad * sin).chunk(2, dim=-1)
    return grad * cos + torch.cat((second, -first), dim=-1)


def losses(logits: Tensor, targets: Tensor, smooth: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The log of the sum is read off the largest probability, which cannot underflow."""
    places = targets.unsqueeze(1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, at_top = wide.max(dim=1, keepdim=True)
    chosen = (1 - smooth) * wide.gather(1, places)
    if smooth:
        chosen += smooth * wide.mean(dim=1, keepdim=True)
    shares = torch.softmax(wide, dim=1)
    found = (top - shares.gather(1, at_top).log() - chosen).squeeze(1)
    if with_gradient:
        if smooth:
            shares -= smooth / logits.shape[1]
        shares.scatter_add_(1, places, torch.full_like(top, smooth - 1))
    return found, shares


def causal_shares(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    queries, keys = scores.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu_(1 + keys - queries)
    return torch.softmax(scores.mul_(scale).masked_fill_(later, float("-inf")), -1).to(dtype)


def causal_shares_gradient(grad: Tensor, shares: Tensor, scale: float) -> Tensor:
    return softmax_gradient(grad, shares).mul_(scale)
