"""LoftQ for a base whose weights are held in few bits: the factors start as what the rounding took away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import ConfigError, ModelError
from rankfold.lora.layers.linear import LinearUpdates
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.starts.loftq import factors_of_difference
from rankfold.models.base.contents import contents_of
from rankfold.models.base.find import find_base
from rankfold.peft_surface import PeftModel


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> dict[str, float]:
    """Start the adapter's factors so that base and update together are near the weights of ``model_path``
    (by default where the base came from): a folder, a repository of the hub, or a GGUF file.

    For every linear layer whose weight is held in few bits, by bitsandbytes or by rankfold.  A change for
    which ``callback`` (model, layer) is false is taken back.  Returns, by layer, the share of the rounding's
    error that is left.  Raises ConfigError if no layer is so, ModelError for weights that are not there.
    Li et al. 2023, arXiv 2310.08659, with a base that is rounded already."""
    left = {}
    for path, layer, whole in _with_originals(peft_model, model_path, adapter_name):
        held = layer.base_weight().detach().float()
        difference = whole.to(held) - held
        size = float(torch.linalg.vector_norm(difference))
        factors = layer.factors(adapter_name)
        before = [factor.detach().clone() for factor in factors]
        lora_a, lora_b = factors_of_difference(difference, layer.r[adapter_name], layer.scaling[adapter_name])
        for factor, value in zip(factors, (lora_a, lora_b), strict=True):
            factor.copy_(value)
        if callback is not None and not callback(peft_model, path):
            for factor, value in zip(factors, before, strict=True):
                factor.copy_(value)
            continue
        rest = difference - layer.scaling[adapter_name] * lora_b @ lora_a
        left[path] = float(torch.linalg.vector_norm(rest)) / size if size else 0.0
    return left


def _with_originals(
    model: PeftModel, place: str | Path | None, name: str
) -> Iterator[tuple[str, Any, Tensor]]:
    """The layers with a rounded weight, and the weight as it is in the files."""
    base: Any = model.get_base_model()
    layers = {path: layer for path, layer in adapter_layers(base) if _is_rounded(layer, name)}
    if not layers:
        raise ConfigError("No bnb LoRA module found on the model, nor another with a weight in few bits")
    source = find_base(_folder(place or str(base.config._name_or_path)))
    with contents_of(source, base, None) as contents:
        if missing := [path for path in layers if f"{path}.weight" not in contents]:
            raise ModelError(f"{source.name} holds no weights of {', '.join(missing)}")
        for path, layer in layers.items():
            yield path, layer, contents[f"{path}.weight"]().numbers()


def _is_rounded(layer: Any, name: str) -> bool:
    if not isinstance(layer, LinearUpdates) or name not in layer.r:
        return False
    weight: Any = layer._parameters.get("weight")
    return weight is None or hasattr(weight, "quant_state") or not weight.is_floating_point()


def _folder(place: str | Path) -> str:
    """``place``, of which PEFT takes the file's path too."""
    return str(Path(place).parent) if str(place).endswith("model.safetensors") else str(place)
