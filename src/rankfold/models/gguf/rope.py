"""Rotary positions of a GGUF file as transformers' ``rope_parameters``.

llama.cpp stores the scaling of Llama 3 not as its four numbers but as the divisor of each frequency (tensor
``rope_freqs.weight``), LongRoPE's the same way, linear and YaRN as keys (``src/llama-model.cpp``,
``conversion/base.py``)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.errors import ModelError
from rankfold.models.gguf.file import GgufFile

USUAL_BASE = 10_000.0
KINDS = ("none", "linear", "yarn", "longrope")
# Of Llama 3.1 to 3.3; a file has only the divisors that they give.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# The numbers of each kind that a file says, or that a tensor in it is made of.
ALWAYS = {"rope_theta", "rope_type", "partial_rotary_factor"}
LENGTH = "original_max_position_embeddings"
SAID = {
    "default": ALWAYS,
    "linear": ALWAYS | {"factor"},
    "llama3": ALWAYS | {"factor", *LLAMA3},
    "yarn": ALWAYS | {"factor", LENGTH},
    "longrope": ALWAYS | {"factor", "long_factor", "short_factor", "attention_factor", LENGTH},
}


def rope_parameters(file: GgufFile, head_dim: int) -> tuple[dict[str, Any], str]:
    """The parameters, and in words what they scale; empty if nothing.

    Raises ModelError for a scaling that is not known, and for one that transformers cannot compute."""
    base = float(file.own("rope.freq_base", USUAL_BASE))
    width = int(file.own("rope.dimension_count", head_dim))
    parameters: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    if width != head_dim:
        parameters["partial_rotary_factor"] = width / head_dim
    factor = float(file.own("rope.scaling.factor", file.own("rope.scale_linear", 0.0)) or 1.0)
    kind = file.own("rope.scaling.type", "linear")
    attention = float(file.own("rope.scaling.attn_factor", 1.0))
    found = [
        *([_longrope(file, attention)] if kind == "longrope" else []),
        *([_by_divisors(file, base, width)] if "rope_freqs.weight" in file.tensors else []),
        *([_yarn(file, factor, attention)] if kind == "yarn" else []),
        *([{"rope_type": "linear", "factor": factor}] if kind == "linear" and factor != 1.0 else []),
    ]
    if kind not in KINDS:
        raise ModelError(f"rope.scaling.type is {kind!r}; {', '.join(KINDS)} are known")
    if len(found) > 1:
        raise ModelError(f"the positions are scaled twice: {' and '.join(map(_told, found))}")
    scaled = found[0] if found else {}
    if attention != 1.0 and kind not in ("yarn", "longrope"):
        raise ModelError(f"rope.scaling.attn_factor is {attention:g} without yarn or longrope")
    return parameters | scaled, f"rope scaling {_told(scaled)} from the file" if scaled else ""


def _yarn(file: GgufFile, factor: float, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(file),
        "attention_factor": (0.1 * math.log(factor) + 1.0) * attention,
    }


def _longrope(file: GgufFile, attention: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": file.numbers("rope_factors_long.weight").tolist(),
        "short_factor": file.numbers("rope_factors_short.weight").tolist(),
        "original_max_position_embeddings": _original_length(file),
        "attention_factor": attention,
    }


def _by_divisors(file: GgufFile, base: float, width: int) -> dict[str, Any]:
    """Llama 3's parameters if they give the divisors in the file, else the divisors themselves."""
    divisors = file.numbers("rope_freqs.weight")
    if divisors.shape != (width // 2,):
        raise ModelError(f"rope_freqs.weight has the shape {tuple(divisors.shape)}, wanted ({width // 2},)")
    factor = float(divisors.max())
    if torch.allclose(divisors, llama3_divisors(base, width, factor), rtol=1e-4):
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    return {
        "rope_type": "longrope",
        "long_factor": divisors.tolist(),
        "short_factor": divisors.tolist(),
        "original_max_position_embeddings": int(file.own("context_length")),
        "attention_factor": 1.0,
    }


def llama3_divisors(
    base: float, width: int, factor: float, low: float = 1.0, high: float = 4.0, length: int = 8192
) -> Tensor:
    """By what Llama 3's scaling divides each of ``width`` / 2 frequencies: LlamaModel.generate_extra_tensors
    in llama.cpp's conversion/llama.py."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves = 2 * math.pi / frequencies
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(waves < length / high, 1.0, torch.where(waves > length / low, factor, between))
    return divisors.float()


def rope_keys(config: Any) -> dict[str, Any]:
    """The architecture's keys that say what ``config`` does of positions: conversion/base.py,
    TextModel.set_gguf_parameters, and the models' own."""
    rope, found = dict(config.rope_parameters), {}
    if "full_attention" in rope:
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    if kind not in SAID:
        raise ModelError(f"rope_type is {kind!r}, which GGUF has no words for here")
    if unsaid := [name for name, value in rope.items() if name not in SAID[kind] and value is not None]:
        raise ModelError(f"GGUF has no words here for {', '.join(sorted(unsaid))} of rope_type {kind!r}")
    found["rope.freq_base"] = float(rope["rope_theta"])
    if kind in ("linear", "yarn", "longrope"):
        found["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        length = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        found["rope.scaling.original_context_length"] = int(length)
    if kind == "longrope":
        scale = config.max_position_embeddings / length
        usual = math.sqrt(1 + math.log(scale) / math.log(length)) if scale > 1 else 1.0
        found["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or usual)
    return found


def rope_tensors(config: Any) -> dict[str, Any]:
    """What of the scaling is written as tensors, in float32."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        named = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.array(rope[field], np.float32) for name, field in named.items()}
    if kind != "llama3":
        return {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    divisors = llama3_divisors(rope["rope_theta"], width, rope["factor"], *(rope[name] for name in LLAMA3))
    return {"rope_freqs.weight": divisors.numpy()}


def _original_length(file: GgufFile) -> int:
    return int(file.own("rope.scaling.original_context_length", file.own("context_length")))


def _told(scaled: dict[str, Any]) -> str:
    factor = f" x{scaled['factor']:g}" if "factor" in scaled else " by a divisor for each frequency"
    return f"{scaled['rope_type']}{factor}"
