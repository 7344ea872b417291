"""DoRA: a trained length for each row of the changed weight, whose direction alone LoRA then changes.

With rows w_i of the base weight, y = (m_i / ||w_i + s b_i A||) (w_i + s b_i A) x + bias.
Liu et al. 2024 (arXiv 2402.09353), equation 5; the norm has no gradient (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.kernels.low_rank import low_rank_update
from rankfold.kernels.row_norm import low_rank_row_norm
from rankfold.lora.layers.base import upcast

MAGNITUDES = "lora_magnitude_vector"


class Magnitude(nn.Module):
    """The magnitudes of one adapter, as ``weight``: the state dict's key is PEFT's."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)


def row_norms(weight: Tensor, row_dim: int, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """The norms of the rows (along ``row_dim``) of ``weight`` with ``scale * B A`` in it, (rows)."""
    lora_a, lora_b = (factor.detach().flatten(1) for factor in factors)
    rows = weight.detach().movedim(row_dim, 0).flatten(1)
    return low_rank_row_norm(rows, lora_a, lora_b, scale)


def row_factors(magnitude: Tensor, norms: Tensor) -> Tensor:
    """What each row of the changed weight is multiplied by, (rows), at least float32.

    The norm is rounded as the magnitudes are, so that at the start the quotient is one exactly."""
    magnitude = magnitude.flatten()
    norms = norms.to(magnitude.dtype)
    return upcast(magnitude) / upcast(norms.clamp_min(torch.finfo(norms.dtype).tiny))


def add_rescaled_update(
    out: Tensor, base: Tensor, x: Tensor, factors: tuple[Tensor, Tensor], rows: Tensor, scale: float
) -> Tensor:
    """``out + (f - 1) * base + f * scale * x A^T B^T`` in the dtype of ``out``.

    Shapes: out and base (..., out), base at least float32 and without its bias, x (..., in), factors
    A (rank, in) and B (out, rank), rows f (out).  f meets the narrow B instead of the wide product."""
    lora_a, lora_b = factors
    total = torch.addcmul(upcast(out), base, rows - 1)
    rescaled_b = rows.to(lora_b.dtype)[:, None] * lora_b
    return (total + low_rank_update(x, lora_a, rescaled_b, scale)).to(out.dtype)
