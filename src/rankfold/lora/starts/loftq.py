"""LoftQ: the factors start as what a quantised base weight is away from the weight, alternating.

Li et al. 2023, arXiv 2310.08659, algorithm 1.  PEFT's factors make up for the difference where the scale is
one only; here the scale is in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BITS = (4, 8)
Rounding = Callable[[Tensor], Tensor]


def problems_of(config: dict[str, Any]) -> list[str]:
    bits = config.get("loftq_bits", 4)
    if bits not in BITS:
        return [f"Only nf4 and int8 quantization is supported: loftq_bits must be 4 or 8, got {bits}"]
    if bits == BITS[0] and find_spec("bitsandbytes") is None:
        return ["bitsandbytes is not available, please install it to use LoftQ with 4 bits"]
    return []


def rounding_to(bits: int) -> Rounding:
    """To NormalFloat of 4 bits in blocks of 64, or 8 bits by rows, and back to numbers."""
    return _nf4 if bits == BITS[0] else _int8


def _nf4(matrix: Tensor) -> Tensor:
    library = importlib.import_module("bitsandbytes.functional")
    packed, state = library.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=False)
    numbers: Tensor = library.dequantize_4bit(packed, state)
    return numbers.to(matrix.dtype)


def _int8(matrix: Tensor) -> Tensor:
    most = matrix.abs().amax(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix * (127 / most)).round() * (most / 127)


def rounded_parts(
    matrix: Tensor, rank: int, scale: float, rounding: Rounding, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in), B (out, rank) and the rounded base (out, in); ``base + scale B A`` is near ``matrix``."""
    difference = torch.zeros_like(matrix)
    for _ in range(iterations):
        base = rounding(matrix - difference)
        lora_a, lora_b = factors_of_difference(matrix - base, rank, scale)
        difference = scale * lora_b @ lora_a
    return lora_a, lora_b, base


def factors_of_difference(difference: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scale * B A`` the nearest of that rank to ``difference``."""
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()
