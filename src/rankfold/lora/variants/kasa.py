"""KaSA: the update has its singular values as a factor of their own, ``s B diag(d) A``, and the base weight
lacks its ``rank`` smallest singular triplets.  Wang et al. 2024, arXiv 2412.06071, equations 5-11.

As with the other starts that change the base, the layer keeps both weights, and an adapter that is not
applied leaves the base as it was; PEFT changes it for good."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.lora.config.variant_configs import KasaConfig
from rankfold.lora.layers.base import AdapterSpec, upcast
from rankfold.lora.layers.residual_base import splitting_problems
from rankfold.lora.variants.variant import HeldTensors, Pair, Variant

HELD = "lora_diag"


def _start(layer: Any, spec: AdapterSpec) -> None:
    lora_a = layer.factors(spec.name)[0]
    if HELD not in layer._modules:
        layer._modules[HELD] = nn.ParameterDict()
    layer.lora_diag[spec.name] = nn.Parameter(torch.randn(spec.rank).to(lora_a))
    if layer.split is not None:
        layer.split.names.append(spec.name)  # of the same kind: its residual is the same
    else:
        layer.keep_residual(spec.name, without_minor(layer.base_weight().detach(), spec.rank), _kind(spec))


def _kind(spec: AdapterSpec) -> str:
    return f"kasa of rank {spec.rank}"


def without_minor(matrix: Tensor, rank: int) -> Tensor:
    """``matrix`` without its ``rank`` smallest singular triplets, in its dtype."""
    left, values, right = torch.linalg.svd(upcast(matrix), full_matrices=False)
    kept: Tensor = (left[:, :-rank] * values[:-rank]) @ right[:-rank]
    return kept.to(matrix.dtype)


def _pair(layer: Any, name: str) -> Pair:
    lora_a, lora_b = layer.factors(name)
    return layer.lora_diag[name][:, None] * lora_a, lora_b


def _tensors(layer: Any, name: str) -> HeldTensors:
    return {HELD: layer.lora_diag[name]}


def _problems(layer: nn.Module, spec: AdapterSpec) -> list[str]:
    if getattr(layer, "fan_in_fan_out", False) or type(layer).__name__ == "Conv1D":
        return ["KaSA does not support `fan_in_fan_out=True` layers (e.g. Conv1D), as PEFT cannot load them"]
    weight = layer._parameters["weight"]
    size = min(weight.shape) if isinstance(weight, Tensor) else 0
    told = f"KaSA requires `r` ({spec.rank}) to be smaller than min(in_features, out_features) ({size})"
    return [told] if spec.rank >= size else splitting_problems(layer, spec, _kind(spec))


def regularisation(layer: Any, name: str, beta: float, gamma: float) -> Tensor:
    """``beta sum(d^2) + gamma (||B^T B - I|| + ||A A^T - I||)``: equations 9-11."""
    lora_a, lora_b = (factor.float() for factor in layer.factors(name))
    eye = torch.eye(len(lora_a), device=lora_a.device)
    apart = torch.linalg.norm(lora_b.T @ lora_b - eye) + torch.linalg.norm(lora_a @ lora_a.T - eye)
    total: Tensor = beta * layer.lora_diag[name].float().square().sum() + gamma * apart
    return total


def loss_of(layers: Iterable[Any], names: Collection[str]) -> Tensor | None:
    """``regularisation`` summed over ``layers`` and the adapters ``names``; None if none is KaSA's."""
    terms = [
        regularisation(layer, name, config.beta, config.gamma)
        for layer in layers
        for name in names
        if name in getattr(layer, HELD, ())
        for config in [cast(KasaConfig, layer.specs[name].config.kasa_config)]
    ]
    return sum(terms, torch.zeros(())) if terms else None


KASA = Variant(_start, pair=_pair, tensors=_tensors, problems=_problems)
