"""The singular values of a product of low-rank factors, without the product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 1e-7  # of the largest singular value: below it a direction of float32 factors is rounding


class FactorSVD(NamedTuple):
    """``U`` (out, k), ``S`` (k, falling) and ``V`` (in, k), so that U S V^T is the product."""

    U: Tensor
    S: Tensor
    V: Tensor

    def cut(self, rank: int | None = None) -> FactorSVD:
        """Without what is rounding noise, and of ``rank`` at most; of rank 1 at least."""
        kept = max(1, int((NOISE * self.S[0] < self.S).sum()))
        kept = kept if rank is None else min(kept, rank)
        return FactorSVD(self.U[:, :kept], self.S[:kept], self.V[:, :kept])

    @property
    def norm_squared(self) -> float:
        return float(self.S.square().sum())


def svd_of_product(lora_b: Tensor, lora_a: Tensor) -> FactorSVD:
    """That of ``B A`` for B (out, r) and A (r, in), in float64, with k = min(out, r, in) at most.

    By QR of both factors and the SVD of their small core (Halko, Martinsson & Tropp 2011, section 5.1): exact
    but for rounding, and O((out + in) r^2) where that of the product is O(out in min(out, in))."""
    left, right = torch.linalg.qr(lora_b.double()), torch.linalg.qr(lora_a.double().T)
    u, s, vt = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return FactorSVD(left.Q @ u, s, right.Q @ vt.T)
