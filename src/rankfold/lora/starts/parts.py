"""The starts that take a part of the base weight into the factors, in one table.

CorDA and LoRA-GA need what was gathered before: it lies on the layer under PEFT's name, put there by
``preprocess_corda`` and ``preprocess_loraga``, and is used up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rankfold.errors import ConfigError, RankfoldWarning, bullet_list
from rankfold.lora.config.data_starts import LoraGAConfig
from rankfold.lora.config.lora_config import PISSA, LoraConfig
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.layers.init import base_part
from rankfold.lora.starts import corda, loftq, lora_ga

EIGENS = "eigens"
# Under this name a layer may hold the A and B of such a start themselves, made before and kept in a file.
HANDED = "lora_start"
GRADIENT = "_peft_loraga_grad"


class Parts(NamedTuple):
    """A (rank, in), B (out, rank) and what is left of the weight (out, in), None for all but ``s B A``."""

    lora_a: Tensor
    lora_b: Tensor
    residual: Tensor | None = None


def _base_part(layer: Any, matrix: Tensor, spec: AdapterSpec) -> Parts:
    return Parts(*base_part(matrix, str(spec.config.init_lora_weights), spec.rank, spec.scale))


def _oriented(layer: Any, matrix: Tensor, spec: AdapterSpec) -> Parts:
    return Parts(*corda.factors_of(layer.__dict__.pop(EIGENS), spec.scale))


def _along_gradient(layer: Any, matrix: Tensor, spec: AdapterSpec) -> Parts:
    gradient = layer.__dict__.pop(GRADIENT)
    gradient = gradient.T if layer.row_dim == 1 else gradient
    config = cast(LoraGAConfig, spec.config.lora_ga_config or LoraGAConfig())
    lora_a, lora_b = lora_ga.factors_of(gradient, matrix, spec.rank, spec.scale, config)
    dtype = layer.merged_like().dtype
    return Parts(lora_a.to(dtype).float(), lora_b.to(dtype).float())


def _rounded(layer: Any, matrix: Tensor, spec: AdapterSpec) -> Parts:
    config = cast(dict[str, Any], spec.config.loftq_config)
    rounding = loftq.rounding_to(config.get("loftq_bits", 4))
    return Parts(*loftq.rounded_parts(matrix, spec.rank, spec.scale, rounding, config.get("loftq_iter", 1)))


TABLE: dict[str, Callable[[Any, Tensor, AdapterSpec], Parts]] = {
    "olora": _base_part,
    "corda": _oriented,
    "lora_ga": _along_gradient,
    "loftq": _rounded,
}
GATHERED = {"corda": EIGENS, "lora_ga": GRADIENT}


def splits_base(layer: Any, config: LoraConfig) -> bool:
    """Whether the start of an adapter of ``config`` takes a part of the weight of ``layer``, adapted or not.

    One from a file whose start was gathered from data takes none: what it took is not in the file."""
    start = config.init_lora_weights
    if not isinstance(start, str):
        return False
    if start in GATHERED:
        return _is_gathered(layer, start)
    if start == "loftq":
        weight = layer._parameters.get("weight")
        return weight is not None and weight.is_floating_point() and not hasattr(weight, "quant_state")
    return start in TABLE or PISSA.fullmatch(start) is not None


def _is_gathered(layer: Any, start: str) -> bool:
    return not {GATHERED[start], HANDED}.isdisjoint(layer.__dict__)


def needs_weight(layer: Any, config: LoraConfig) -> bool:
    """Whether an adapter of ``config`` leaves another weight in ``layer`` than it finds."""
    return splits_base(layer, config) or config.kasa_config is not None


def check_gathered(layers: Mapping[str, Any], config: LoraConfig) -> None:
    """For a new adapter whose start is gathered from data: raise ConfigError where PEFT does because that is
    not there, and warn where PEFT starts plainly."""
    start = str(config.init_lora_weights)
    if start not in GATHERED:
        return
    missing = [
        path
        for path, layer in layers.items()
        if getattr(layer, "weight", None) is not None
        and type(layer).__name__ != "Embedding"
        and not _is_gathered(layer, start)
    ]
    if missing and start == "corda":
        headline = f"`{EIGENS}` attribute not found for layer, please run `preprocess_corda` first:"
        raise ConfigError(bullet_list(headline, missing))
    if missing:
        warnings.warn(
            f"no gradients were gathered for {len(missing)} layers ({missing[0]}, ...), which start plainly: "
            "run preprocess_loraga first",
            RankfoldWarning,
            stacklevel=4,
        )


def parts_of(layer: Any, matrix: Tensor, spec: AdapterSpec) -> Parts:
    """What the start of ``spec`` takes of ``matrix`` (out, in), the weight of ``layer``, at least float32."""
    start = str(spec.config.init_lora_weights)
    if HANDED in layer.__dict__:
        return Parts(*layer.__dict__.pop(HANDED))
    with torch.no_grad():
        return TABLE.get(start, _base_part)(layer, matrix, spec)
