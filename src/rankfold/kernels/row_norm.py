"""The row norms of a weight plus a low-rank update, without the sum."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22  # of a half-precision weight widened at a time: 16 MiB of float32


@torch.no_grad()
def low_rank_row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``||w_i + s b_i A||`` of each row, as the root of ``||w||^2 + 2 s b.(A w) + s^2 b (A A^T) b^T``.

    Shapes: weight (rows, columns), lora_a (rank, columns), lora_b (rows, rank) -> (rows), at least
    float32.  Nothing as large as the weight is made; a half-precision weight is widened a block of rows
    at a time.  With ``lora_b`` zero the result is the norm of the weight's rows by the same operations.

    Where the update all but cancels the weight, the three terms do not hold the norm's digits: it is
    not taken for less than ``sqrt(eps) * hypot(||w||, ||s b A||)``, 3e-4 of its parts in float32.
    Zero rows get a norm of 1e-19, so that a quotient of norms stays finite.
    Liu et al. 2024 (arXiv 2402.09353), equation 5; the expansion is the binomial one."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    limits = torch.finfo(dtype)
    lora_a, lora_b = lora_a.to(dtype), scale * lora_b.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        own, products = _row_products(weight, lora_a)
        cross = (products * lora_b).sum(1)
        update = ((lora_b @ (lora_a @ lora_a.T)) * lora_b).sum(1).clamp_min(0)
    floor = (limits.eps * (own + update)).clamp_min(limits.tiny)
    return torch.maximum(own + 2 * cross + update, floor).sqrt()


def _row_products(weight: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    """``||w_i||^2`` (rows) and ``A w_i`` (rows, rank) in the dtype of ``lora_a``."""
    rows = weight.shape[0] if weight.dtype == lora_a.dtype else max(1, BLOCK_ELEMENTS // weight.shape[1])
    parts = [_block_products(block.to(lora_a.dtype), lora_a) for block in weight.split(rows)]
    own, products = zip(*parts, strict=True)
    return torch.cat(own), torch.cat(products)


def _block_products(block: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.vector_norm(block, dim=1).square(), block @ lora_a.T
