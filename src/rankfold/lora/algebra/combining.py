"""Several updates as one.

TIES: Yadav et al. 2023, arXiv 2306.01708; DARE: Yu et al. 2023, arXiv 2311.03099; the shared basis, Core
Space: Panariello et al. 2025, arXiv 2509.17786."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rankfold.lora.algebra.factor_svd import FactorSVD

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Combining:
    """One of ``METHODS``, with the ``density``, the share of values that all but "linear" keep, and how TIES
    elects signs: by the "total" of the values or by "frequency"."""

    method: str = "linear"
    density: float | None = None
    majority: str = "total"

    def of(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The tensors, all of one shape, as one."""
        density = self.density or 0.0
        if self.method in ("ties", "magnitude_prune"):
            tensors = [_pruned(tensor, density) for tensor in tensors]
        elif self.method.startswith("dare"):
            tensors = [_dropped(tensor, density) for tensor in tensors]
        stack = torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)])
        if not self.method.endswith("ties"):
            return stack.sum(0)
        plain = torch.stack(list(tensors))
        signs = plain.sign() if self.majority == "frequency" else plain
        agreed = plain.sign() == torch.where(signs.sum(0) >= 0, 1, -1)
        return (stack * agreed).sum(0) / agreed.sum(0).clamp(min=1)

    def of_products(self, pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> FactorSVD:
        """The products ``B A`` of pairs (out, r) and (r, in), of any ranks, as one, in float64.

        They are combined where they differ: as small cores in an orthonormal basis that all their rows and
        columns lie in, so that nothing is lost and nothing of the weight's size is made."""
        left, right = (
            torch.linalg.svd(torch.cat(side, dim=1), full_matrices=False).U
            for side in ([b.double() for b, _ in pairs], [a.double().T for _, a in pairs])
        )
        cores = [(left.T @ b.double()) @ (a.double() @ right) for b, a in pairs]
        u, s, vh = torch.linalg.svd(self.of(cores, weights), full_matrices=False)
        return FactorSVD(left @ u, s, right @ vh.T)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    """``tensor`` with all but its largest values zero."""
    kept = tensor.flatten().abs().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def _dropped(tensor: Tensor, density: float) -> Tensor:
    """``tensor`` with values left out at random, the others scaled so that the mean stays."""
    mask = torch.bernoulli(torch.full_like(tensor, density))
    return tensor * mask / density
