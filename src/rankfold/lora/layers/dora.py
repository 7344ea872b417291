"""DoRA: a trained length for each row of the changed weight, whose direction alone LoRA then changes.

With rows w_i of the base weight, y = (m_i / ||w_i + s b_i A||) (w_i + s b_i A) x + bias.
Liu et al. 2024 (arXiv 2402.09353), equation 5; the norm has no gradient (section 4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rankfold.kernels.low_rank import low_rank_update
from rankfold.kernels.row_norm import low_rank_row_norm
from rankfold.lora.layers.base import upcast

if TYPE_CHECKING:
    from rankfold.lora.layers.factors import LoraLayer

MAGNITUDES = "lora_magnitude_vector"
MATRIX = 2  # dimensions


class Magnitude(nn.Module):
    """The magnitudes of one adapter, as ``weight``: the state dict's key is PEFT's."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)


def start_magnitude(layer: LoraLayer, name: str) -> None:
    """Give one adapter the row norms of its changed weight as magnitudes, so that it changes nothing yet.

    Shape: (rows), or (1, rows, 1, ..) for a weight of more than two dimensions, as in PEFT.  They have
    the dtype of the factors; PEFT rounds them to the base's dtype first."""
    weight = layer.base_weight_for([name])
    norms = row_norms(layer, name, weight).to(layer.factors(name)[1].dtype)
    if weight.dim() > MATRIX:
        norms = norms.view(1, -1, *[1] * (weight.dim() - MATRIX))
    if MAGNITUDES not in layer._modules:
        layer._modules[MAGNITUDES] = nn.ModuleDict()
    layer.lora_magnitude_vector[name] = Magnitude(norms)


def magnitude_tensors(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
    """The magnitudes of one adapter by their key in PEFT's file; none if it is no DoRA adapter."""
    held = layer.lora_magnitude_vector
    return {MAGNITUDES: held[name].weight} if name in held else {}


def row_norms(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    """The norms of the rows of ``weight`` with one adapter's update in it, (rows)."""
    lora_a, lora_b = (factor.detach().flatten(1) for factor in layer.factors(name))
    rows = weight.detach().movedim(cast(int, layer.row_dim), 0).flatten(1)
    return low_rank_row_norm(rows, lora_a, lora_b, layer.scaling[name])


def row_factors(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    """What each row of the changed weight is multiplied by, (rows), at least float32.

    The norm is rounded as the magnitudes are, so that at the start the quotient is one exactly."""
    magnitude = layer.lora_magnitude_vector[name].weight.flatten()
    norms = row_norms(layer, name, weight).to(magnitude.dtype)
    return upcast(magnitude) / upcast(norms.clamp_min(torch.finfo(norms.dtype).tiny))


def rescaled_weight(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    """``weight`` with one adapter in it, its update added and its rows brought to their magnitudes."""
    factors = row_factors(layer, name, weight)
    shape = [1] * weight.dim()
    shape[cast(int, layer.row_dim)] = -1
    return factors.view(shape) * (weight + layer.delta(name))


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
