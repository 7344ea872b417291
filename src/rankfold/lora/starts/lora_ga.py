"""LoRA-GA: the factors start along the singular vectors of the weight's gradient, so that a first step is
near one of full fine-tuning.  Wang et al. 2024, arXiv 2407.05000, theorem 3.1 and section 3.3, as in PEFT."""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.lora.config.data_starts import LoraGAConfig


def factors_of(
    gradient: Tensor, matrix: Tensor, rank: int, scale: float, config: LoraGAConfig
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) for the ``gradient`` of ``matrix``, both (out, in).

    The randomised decomposition draws from torch's generator, as in PEFT, from which one seed then gives the
    same factors."""
    gradient = gradient.float()
    left, values, right = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
    of_a, of_b = _places(config.direction, rank)
    lora_a, lora_b, held = right.T[of_a], left[:, of_b] * values[of_b], values[of_b]
    if config.scale == "stable":
        lora_b = lora_b * (matrix.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        largest = torch.svd_lowrank(matrix.float(), q=rank, niter=4)[1][0]
        lora_b = lora_b * (largest / held[0]) if held[0] > 0 else lora_b
    elif config.scale == "gd_scale":
        lora_a, lora_b = lora_a / scale, lora_b / scale
    return lora_a.contiguous(), lora_b.contiguous()


def _places(direction: str, rank: int) -> tuple[Tensor, Tensor]:
    """Which singular vectors A takes from the right and B from the left."""
    first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
    if direction == "ArBr":
        return 2 * first + 1, 2 * first
    if direction == "A2rBr":
        return second, first
    if direction == "ArB2r":
        return first, second
    chosen = torch.randperm(2 * rank)[:rank]
    return chosen, chosen
