"""The demonstration behind ``rankfold explain``: from an SVD to a LoRA layer, on one small weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.lora import LoraConfig
from rankfold.peft_surface import get_peft_model
from rankfold.spectrum.factor import Factors, low_rank_factors, numerical_rank, singular_values

SIZE = 10
TRUE_RANK = 2


@dataclass(frozen=True)
class Demonstration:
    """A weight of low rank, its factors, and what a LoRA layer of that rank does; all numbers measured."""

    weight: Tensor
    values: Tensor
    rank: int
    factors: Factors
    output_error: float
    starts_as_base: bool
    merged_error: float
    merged_type: str


def demonstrate(seed: int = 0) -> Demonstration:
    """Make a 10x10 weight of rank 2, factor it, and adapt, train one step and merge a layer that holds it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, TRUE_RANK, generator=generator) @ torch.randn(
        TRUE_RANK, SIZE, generator=generator
    )
    x = torch.randn(SIZE, generator=generator)
    rank = numerical_rank(weight)
    factors = low_rank_factors(weight, rank)
    starts_as_base, merged_error, merged_type = _lora_on(weight, x, rank)
    return Demonstration(
        weight=weight,
        values=singular_values(weight),
        rank=rank,
        factors=factors,
        output_error=_largest(factors.B @ (factors.A @ x) - weight @ x),
        starts_as_base=starts_as_base,
        merged_error=merged_error,
        merged_type=merged_type,
    )


def _lora_on(weight: Tensor, x: Tensor, rank: int) -> tuple[bool, float, str]:
    """Whether the adapted layer starts as the base, and what is left after one step and a merge."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
        net[0].weight = nn.Parameter(weight.clone())
        base_output = net(x)
        model = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    starts_as_base = torch.equal(model(x), base_output)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()
    tuned_output = model(x)
    merged = model.merge_and_unload()
    return starts_as_base, _largest(merged(x) - tuned_output), type(net[0]).__name__


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())
