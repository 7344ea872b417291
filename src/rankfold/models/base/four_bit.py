"""bitsandbytes' 4-bit linear layers (NF4: Dettmers et al. 2023, arXiv 2305.14314), on a CPU as well."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ModelError
from rankfold.lora.layers.quantised import is_quantised


def require_bitsandbytes() -> Any:
    """The module ``bitsandbytes``.  Raises ModelError if it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ModelError(
            "stored='nf4' needs the package bitsandbytes (pip install bitsandbytes); without it, take "
            "stored='q4_0', which has 4 bits too, or 'int8'"
        ) from error


@torch.no_grad()
def to_four_bits(layer: nn.Linear, weight: Tensor, dtype: torch.dtype) -> None:
    """Turn ``layer``, perhaps on the meta device, into a ``Linear4bit`` that holds ``weight`` as NF4, in
    blocks of 64 whose scales have 8 bits, and computes in ``dtype``; in place."""
    library = require_bitsandbytes()
    fresh = library.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    numbers = weight.to(dtype).contiguous()
    held = library.nn.Params4bit(numbers, requires_grad=False, quant_type="nf4", module=fresh)
    layer._parameters["weight"] = held.to(numbers.device)  # which rounds it
    layer.__class__ = type(fresh)
    own = {name: value for name, value in vars(fresh).items() if name not in vars(layer)}
    layer.__dict__.update(own)
    held.module = None
    layer.__dict__["quant_state"] = layer.weight.quant_state  # type: ignore[attr-defined]
    # Else the first call without gradients would repack the weight, and later ones have none.
    layer.__dict__["support_avx512bf16_for_cpu"] = False


def four_bit_sizes(model: nn.Module) -> list[int]:
    """The bytes that each 4-bit weight of ``model`` takes, with its scales."""
    weights: list[Any] = [layer.weight for layer in model.modules() if is_quantised(layer)]
    return [_size(weight) for weight in weights if getattr(weight, "quant_state", None) is not None]


def _size(weight: Any) -> int:
    state = weight.quant_state
    scales = [state.absmax, *([state.state2.absmax, state.state2.code] if state.nested else [])]
    return int(weight.data.nbytes + sum(tensor.nbytes for tensor in scales))
