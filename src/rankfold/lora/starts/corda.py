"""CorDA: the factors start as the part of the weight that matters most (ipm), or least (kpm), for inputs like
the ones seen.  Yang et al. 2024, arXiv 2406.05223, section 3.2, with PEFT's damping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean variance; doubled until the inverse is one
INVERSE_ERROR = 0.05


@dataclass
class CordaEigens:
    """``U_WC`` (out, rank), ``S_WC`` (rank) and ``V_WC`` (in, rank): the singular vectors of the weight times
    the covariance, the right ones brought back by its inverse.  The names are PEFT's."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def eigens_of(matrix: Tensor, covariance: Tensor, rank: int, method: str) -> CordaEigens:
    """``matrix`` (out, in) seen by the ``covariance`` (in, in) of its inputs, cut to ``rank``."""
    eye = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    damping = DAMPING
    while True:
        damped = covariance + eye * (covariance.diag().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < INVERSE_ERROR:
            break
        damping *= 2
    left, values, right = torch.linalg.svd(matrix.float() @ damped, full_matrices=False)
    back = (right @ inverse).T
    kept = slice(0, rank) if method == "ipm" else slice(len(values) - rank, len(values))
    return CordaEigens(values[kept].clone(), left[:, kept].clone(), back[:, kept].clone())


def factors_of(eigens: CordaEigens, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scale * B A`` the part that ``eigens`` are of."""
    root = (eigens.S_WC / scale).sqrt()
    return (eigens.V_WC * root).T.contiguous(), eigens.U_WC * root


def balanced(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each row of A (rank, in) as long as its column of B (out, rank).

    By the paper's split A shrinks and B grows with the size of the covariance, which says nothing of the
    weight; AdamW, whose steps are of one size for both, then goes far too far in one of them."""
    ratio = (lora_b.norm(dim=0) / lora_a.norm(dim=1)).sqrt()
    ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)  # a part of the weight that is none
    return lora_a * ratio[:, None], lora_b / ratio
