"""What keeps a layer from carrying a pair of factors, with the reason."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from rankfold.lora.config.data_starts import start_from_data
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec
from rankfold.lora.layers.residual_base import splitting_problems
from rankfold.lora.starts import loftq
from rankfold.lora.starts.parts import splits_base
from rankfold.lora.variants.table import variant_of

MICA = "mica"


def carrying_problems(kind: Any, layer: nn.Module, spec: AdapterSpec) -> list[str]:
    """Why ``layer`` cannot become a ``kind``, a class of LoraLayer, with the adapter of ``spec``."""
    config, found = spec.config, []
    if config.use_dora and kind.row_dim is None:
        name = kind.plain_class.__name__
        found.append(f"{name} does not support DoRA (yet), please set use_dora to False")
    found += _variant_problems(kind, layer, spec)
    if config.init_lora_weights == MICA:
        found += _minor_problems(kind, layer, spec)
    if kind.own_start:
        return found
    splits = kind.is_matrix and splits_base(layer, config)
    found += _start_problems(kind, spec)
    found += splitting_problems(layer, spec) if splits else []
    changing = config.use_dora or splits or config.kasa_config is not None
    if changing and isinstance(layer, AdapterLayer) and layer.merged:
        found.append(f"{layer.merged_adapters} are merged into it; unmerge_adapter() first")
    return found


def _start_problems(kind: Any, spec: AdapterSpec) -> list[str]:
    """What is wrong with a start for any layer that becomes a ``kind``."""
    start, name = spec.config.init_lora_weights, kind.plain_class.__name__
    plain = not isinstance(start, str) or start in ("gaussian", MICA) or start_from_data(start)
    if not plain and not kind.is_matrix:
        return [f"Unknown initialization: init_lora_weights={start!r} is for linear layers, not {name}"]
    if start == "orthogonal" and spec.rank % 2:
        return [f"Orthogonal initialization requires the LoRA rank to be even, got {spec.rank} instead."]
    return loftq.problems_of(cast(dict[str, Any], spec.config.loftq_config)) if start == "loftq" else []


def _variant_problems(kind: Any, layer: nn.Module, spec: AdapterSpec) -> list[str]:
    """What keeps ``layer`` from the variant that ``spec`` asks for."""
    asked = variant_of(spec.config)
    if asked is None:
        return []
    field, variant = asked
    if not kind.has_variants:
        return [f"a {kind.plain_class.__name__} does not support {field}, please set `{field}=None`"]
    return variant.problems(layer, spec)


def _minor_problems(kind: Any, layer: nn.Module, spec: AdapterSpec) -> list[str]:
    """What keeps ``layer`` from MiCA's start."""
    if not (kind.is_matrix or kind.own_start):
        return [f"Unknown initialization: init_lora_weights='mica' is not for a {kind.plain_class.__name__}"]
    weight = layer.weight
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return ["Please initialize MiCA under float32, float16, or bfloat16."]
    size, shape = min(weight.shape), tuple(weight.shape)
    wrong = f"MiCA requires `r` <= min(in_features, out_features) but got r={spec.rank} for a layer with "
    told = f"{wrong}weight shape {shape} (max usable r is {size})."
    return [told] if spec.rank > size else []
