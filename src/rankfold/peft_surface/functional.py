"""Adapters in a model without a wrapper around it: PEFT's calls for libraries that keep their own class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankfold.errors import AdapterError, ConfigError, MergeError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.files.adapter_reader import FLOATS, LoadResult, bad_values
from rankfold.lora.files.checkpoint import file_tensors, fitting
from rankfold.lora.files.renames import PREFIX, renamed
from rankfold.lora.files.saved_embeddings import bring, embedding_tensors, find_brought
from rankfold.lora.layers.base import AdapterLayer, adapter_layers
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.saved import SavedModule
from rankfold.lora.placing.inject import freeze
from rankfold.lora.placing.prepare import prepared
from rankfold.lora.placing.replication import replicated
from rankfold.peft_surface.model import LoraModel, PeftModel


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt the layers of ``model`` in place and return ``model`` itself; its configs are noted in
    ``model.peft_config``.  Calling it again adds another adapter, which becomes the active one.

    ``state_dict``: adapt exactly the modules that its keys name, whatever ``target_modules`` says; the
    values are not read.  ``low_cpu_mem_usage`` is PEFT's word and changes nothing.
    Raises what ``get_peft_model`` raises; ``model`` is then as it was."""
    if state_dict is not None:
        paths = sorted({re.split(r"\.lora_", k.removeprefix(PREFIX))[0] for k in state_dict if ".lora_" in k})
        exact = "|".join(re.escape(path) for path in paths)
        peft_config = replace(peft_config, target_modules=exact, exclude_modules=None)
    held: dict[str, LoraConfig] = model.__dict__.get("peft_config", {})
    if any(True for _ in adapter_layers(model)):
        wrapped = _around(model, held, [adapter_name])
        with replicated(model, peft_config):
            wrapped._place(adapter_name, *prepared(model, peft_config))
        freeze(model)
        wrapped._settle(trainable=not peft_config.inference_mode)
    else:
        wrapped = PeftModel(model, peft_config, adapter_name)
    model.peft_config = wrapped.peft_config  # type: ignore[assignment]
    return model


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several whose updates are added, the active ones, trained unless
    ``inference_mode``.  What is merged is unmerged first.

    Raises ConfigError for an adapter that is not there, or several that cannot be active together."""
    _wrapped(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "lora_") -> list[str] | None:
    """Drop an adapter and its config, and return the names of those active now; None if it was the last
    one, of which nothing stays on the layers (PEFT leaves its wrappers and the config).

    ``prefix`` is PEFT's word and changes nothing.  Raises MergeError while it is merged."""
    wrapped, (inner, _) = _wrapped(model), _inside(model, adapter_name)
    if len(wrapped.peft_config) > 1 or wrapped is model:
        wrapped.delete_adapter(adapter_name)
        return wrapped.active_adapters
    if any(layer.merged for _, layer in adapter_layers(inner)):
        raise MergeError(f"{adapter_name!r} is merged; unmerge it first")
    wrapped.unload()
    wrapped.peft_config.clear()
    return None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn half-precision and float8 factors and token rows of one adapter into float32, in place.

    Does nothing without ``autocast_adapter_dtype``.  ``modules_to_save`` and biases stay, as in PEFT."""
    inner, _ = _inside(model, adapter_name)
    for _, layer in adapter_layers(inner):
        if isinstance(layer, (SavedModule, HeldParameters)) or not autocast_adapter_dtype:
            continue
        for parameter in _parameters(layer, adapter_name):
            if parameter.dtype in FLOATS and parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = parameter.data.float()
        layer.refresh()


def set_requires_grad(
    model: nn.Module, adapter_names: str | Collection[str], requires_grad: bool = True
) -> None:
    """Train, or do not train, the tensors of the named adapters, active or not."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in names:
        for _, layer in adapter_layers(_inside(model, name)[0]):
            for parameter in _parameters(layer, name):
                parameter.requires_grad_(requires_grad)


def _parameters(layer: AdapterLayer, name: str) -> list[nn.Parameter]:
    tensors = layer.adapter_tensors(name).values() if name in layer.adapter_names() else ()
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def _wrapped(model: nn.Module) -> PeftModel:
    """``model`` itself, or a wrapper around it for the length of a call."""
    if isinstance(model, PeftModel):
        return model
    active = next((layer.active_adapters for _, layer in adapter_layers(model)), [])
    return _around(model, vars(model).get("peft_config", {}), active)


def _around(model: nn.Module, configs: dict[str, LoraConfig], active: list[str]) -> PeftModel:
    """A wrapper around a model whose layers are adapted already."""
    wrapped = PeftModel.__new__(PeftModel)
    nn.Module.__init__(wrapped)
    wrapped.widen, wrapped.peft_config, wrapped.targeted_module_names = True, configs, []
    wrapped.adapter_metadata, wrapped._active = {}, active
    wrapped.base_model = LoraModel(model)
    return wrapped


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by the keys of PEFT's file, without ``base_model.model.`` where ``model``
    has no wrapper.

    ``state_dict``: take the values from there, by ``model``'s own names; AdapterError if any is missing."""
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    inner, config = _inside(model, adapter_name)
    tensors: dict[str, Tensor] = {**file_tensors(inner, adapter_name, config)}
    tensors |= embedding_tensors(inner, adapter_name, config, save_embedding_layers)
    if state_dict is not None:
        names = _names(model)
        missing = [names[id(t)] for t in tensors.values() if names.get(id(t), "") not in {*state_dict, ""}]
        if missing:
            raise AdapterError(bullet_list("the given state dict lacks tensors of the adapter:", missing))
        tensors = {k: state_dict[names[id(t)]] if id(t) in names else t for k, t in tensors.items()}
    return {_spelt(key, model): tensor.detach() for key, tensor in tensors.items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Put tensors (as from ``get_peft_model_state_dict``) into an adapter that is in place already.

    Returns the names of the adapter's tensors in ``model`` that were not given, and the keys given that
    have no place.  Raises AdapterError, with nothing changed, for a
    tensor of another shape (unless ``ignore_mismatched_sizes``, which warns) or with NaN or infinity."""
    inner, config = _inside(model, adapter_name)
    wrapped = isinstance(model, PeftModel)
    given = {
        k if wrapped else f"{PREFIX}{k.removeprefix(PREFIX)}": t for k, t in peft_model_state_dict.items()
    }
    tensors, _ = renamed(given, inner, {})
    wanted: dict[str, Tensor] = {**file_tensors(inner, adapter_name, config)}
    brought = find_brought(inner, tensors, wanted, config)
    fits, faults, result = fitting(tensors, wanted | {key: place for key, (_, place) in brought.items()})
    wrong = [text for fault, text in faults if fault == "shape"]
    refused = [] if ignore_mismatched_sizes else wrong
    refused += [text for _, text in bad_values(tensors)]
    if refused:
        raise AdapterError(bullet_list("the given tensors do not fit this model:", sorted(refused)))
    for key, tensor in fits.items():
        place = wanted[key] if key in wanted else brought[key][1]
        place.copy_(tensor)
    bring(inner, adapter_name, dict(brought.values()))
    if wrong:
        warnings.warn(bullet_list("these tensors were not loaded:", sorted(wrong)), stacklevel=3)
    names = _names(model)
    missing = [names[id(wanted[key])] for key in result.missing_keys if id(wanted[key]) in names]
    return LoadResult(missing, [_spelt(key, model) for key in result.unexpected_keys])


def _inside(model: nn.Module, adapter_name: str) -> tuple[nn.Module, LoraConfig]:
    configs: Mapping[str, LoraConfig] = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ConfigError(f"no adapter {adapter_name!r}; the model has {list(configs)}")
    return (model.get_base_model() if isinstance(model, PeftModel) else model), configs[adapter_name]


def _names(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}


def _spelt(key: str, model: nn.Module) -> str:
    return key if isinstance(model, PeftModel) else key.removeprefix(PREFIX)
