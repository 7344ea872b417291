"""The base's embeddings in an adapter's file: which are saved, and what a loaded file brings along."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.errors import AdapterError, ConfigError, RankfoldWarning
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.overrides import file_path, hold, holder_of, own_original
from rankfold.lora.layers.registry import adapter_layers, base_modules
from rankfold.lora.layers.saved import SavedModule
from rankfold.lora.layers.tokens import find_tokens

EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # PEFT 0.21.2, utils/constants.py


def embedding_tensors(
    model: nn.Module, name: str, config: LoraConfig, save: bool | str
) -> dict[str, nn.Parameter]:
    """The parameters of the base's embeddings that belong into the file of ``name``, by PEFT's key:
    those of an embedding that is a target, or all if asked for.

    ``save`` is True, False or "auto": if an embedding is a target (and no token rows are trained), if the
    adapter was loaded with embeddings of its own, or if the vocabulary has another size than the local
    base folder's config says.  Unlike PEFT, this never asks the hub, so for a base named by a hub id a
    changed vocabulary must be saved with True.  Raises ConfigError for any other ``save``."""
    if not isinstance(save, bool) and save != "auto":
        raise ConfigError(f'save_embedding_layers must be True, False or "auto", got {save!r}')
    layers = dict(_embeddings(model))
    targeted = {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, LoraLayer)
        and name in layer.adapter_names()
        and path.rpartition(".")[2] in EMBEDDING_NAMES
    }
    if save == "auto":
        save = bool(targeted) and config.trainable_token_indices is None
        if save:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.",
                RankfoldWarning,
                stacklevel=5,
            )
        save = save or _brought(model, name) or _vocabulary_changed(model, config)
    if not save:
        return {}
    if not layers:
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",
            RankfoldWarning,
            stacklevel=5,
        )
        return {}
    return {
        f"{PREFIX}{file_path(model, f'{path}.{key}')}": _base_value(model, layer, key, name)
        for path, layer in (targeted or layers).items()
        if not (isinstance(layer, SavedModule) and name in layer.adapter_names())
        for key in layer._parameters
        if layer._parameters[key] is not None
    }


def find_brought(
    model: nn.Module, tensors: Mapping[str, Tensor], wanted: Collection[str], config: LoraConfig
) -> dict[str, tuple[str, Tensor]]:
    """The keys of a file that are not ``wanted`` but known: parameters of the base's embeddings, in PEFT's
    spelling with ``base_layer`` or the plain one, each with its dotted name and an empty tensor for it.

    The name is "" for keys that only repeat another one's tensor, and for the rest that a start such as
    PiSSA left of a weight, which comes with the place where that is kept."""
    found = {key: ("", torch.empty_like(t)) for key, t in tensors.items() if _is_repeated(model, key, config)}
    for path, layer in _embeddings(model):
        for key, parameter in layer._parameters.items():
            for spelt in _spellings(model, path, key) & tensors.keys() - {*wanted}:
                if key == "weight" and isinstance(layer, LoraLayer) and layer.split is not None:
                    # What the start left of the base, in the file to the bit: no other base weight.
                    found[spelt] = ("", layer.base_weight_for(layer.split.names).detach())
                elif parameter is not None:
                    found[spelt] = (f"{path}.{key}", torch.empty_like(parameter))
    return found


def embeddings_in(model: nn.Module, keys: Collection[str]) -> list[str]:
    """The dotted names of the base's embeddings that a file with ``keys`` has parameters of: it makes no
    difference to the adapter what they are in the base."""
    return [
        path
        for path, layer in _embeddings(model)
        if any(_spellings(model, path, key) & {*keys} for key in layer._parameters)
    ]


def replaced_by(model: nn.Module, config: LoraConfig, keys: Collection[str]) -> list[str]:
    """The modules of the base that an adapter with ``keys`` in its file puts others in the place of, in part
    or whole.  New rows of an embedding are drawn anew whenever a vocabulary grows, so one of which rows are
    trained is among them."""
    return [*(config.modules_to_save or ()), *find_tokens(model, config), *embeddings_in(model, keys)]


def _spellings(model: nn.Module, path: str, key: str) -> set[str]:
    names = (file_path(model, f"{path}.{key}"), f"{path}.base_layer.{key}", f"{path}.{key}")
    return {f"{PREFIX}{name}" for name in names}


def bring(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Let the adapter ``name`` have its own embeddings, ``tensors`` by dotted name, where they differ from
    the base's; a nameless tensor is passed over.

    Raises AdapterError if tied embeddings come with different values; nothing is changed then."""
    tensors = {path: value for path, value in tensors.items() if path}
    tied: dict[int, str] = {}
    for path, value in tensors.items():
        first = tied.setdefault(id(model.get_parameter(path)), path)
        if not torch.equal(tensors[first], value):
            raise AdapterError(f"the file has different values for {first} and {path}, which the model ties")
    base = {path: own_original(holder_of(model), model.get_parameter(path)) for path in tensors}
    different = {path: value for path, value in tensors.items() if not torch.equal(value, base[path])}
    if different:
        every = {id(model.get_parameter(path)): value for path, value in different.items()}
        places = {
            f"{path}.{key}" if path else key: every[id(parameter)]
            for path, module in base_modules(model)
            for key, parameter in module._parameters.items()
            if id(parameter) in every
        }
        hold(model, name, places, trained=False)


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The input and the output embedding with their dotted names."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    layers = {id(layer) for getter in getters if getter is not None and (layer := getter()) is not None}
    return [(path, module) for path, module in base_modules(model) if id(module) in layers] if layers else []


def _base_value(model: nn.Module, layer: nn.Module, key: str, name: str) -> nn.Parameter:
    """A base parameter as it is unmerged and with ``name`` active."""
    split = layer.split if key == "weight" and isinstance(layer, LoraLayer) else None
    if split is not None and (name in split.names) != split.in_place:
        return nn.Parameter(cast(Tensor, layer.spare_weight), requires_grad=False)
    parameter, holder = cast(nn.Parameter, layer._parameters[key]), holder_of(model)
    if isinstance(layer, AdapterLayer) and key in layer._originals:
        return nn.Parameter(layer._originals[key], requires_grad=False)
    return holder.value(parameter, name) if holder else parameter


def _brought(model: nn.Module, name: str) -> bool:
    holder = holder_of(model)
    return holder is not None and any(not held.trained for held in holder.held.get(name, []))


def _vocabulary_changed(model: nn.Module, config: LoraConfig) -> bool:
    now = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if now is None or not config.base_model_name_or_path or not path.is_file():
        return False
    try:
        recorded = json.loads(path.read_bytes())
    except ValueError:
        return False
    before = recorded.get("vocab_size") if isinstance(recorded, dict) else None
    return before is not None and before != now


def _is_repeated(model: nn.Module, name: str, config: LoraConfig) -> bool:
    """Whether ``name``, a key in a file, only repeats what the file has under another key, or has no effect:
    with ``bias="all"`` PEFT writes the bias of a module of ``modules_to_save`` three times."""
    return config.bias == "all" and any(
        f".{path}.{part}." in name
        for path, layer in adapter_layers(model)
        if isinstance(layer, SavedModule)
        for part in ("original_module", "modules_to_save")
    )
