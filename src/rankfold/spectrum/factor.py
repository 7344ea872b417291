"""Low-rank factors by SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """``B`` (out, rank) and ``A`` (rank, in) with ``B @ A`` the best approximation of their rank."""

    B: Tensor
    A: Tensor

    @property
    def parameters(self) -> int:
        return self.B.numel() + self.A.numel()


def singular_values(weight: Tensor) -> Tensor:
    """The singular values of ``weight`` (out, in), largest first, computed in float64."""
    values: Tensor = torch.linalg.svdvals(weight.double())
    return values


def numerical_rank(weight: Tensor) -> int:
    """How many singular values stand above rounding noise: above ``eps * max(out, in) * largest``, eps of
    the weight's own dtype (Golub & Van Loan, Matrix Computations, section 5.5.8)."""
    values = singular_values(weight)
    noise = torch.finfo(weight.dtype).eps * max(weight.shape) * float(values[0])
    return int((values > noise).sum())


def low_rank_factors(weight: Tensor, rank: int) -> Factors:
    """``B = U_r S_r`` and ``A = V_r^T`` from the thin SVD ``weight = U S V^T`` (out, in), in its dtype.

    No product of that rank is nearer to ``weight`` (Eckart & Young 1936); it is exact once ``rank``
    reaches the rank of ``weight``.  Raises ValueError unless 1 <= rank <= min(out, in)."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must be from 1 to {min(weight.shape)}, got {rank}")
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors(B=(u[:, :rank] * s[:rank]).to(weight.dtype), A=vt[:rank].to(weight.dtype))
