"""Adapters in a model without a wrapper around it: PEFT's calls for libraries that keep their own class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.compat import COMPILED, FULLY_SHARDED, WRAPPED
from rankfold.errors import AdapterError, ConfigError, NoMatchError, RankfoldWarning, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.files.adapter_reader import FLOATS, LoadResult, adapter_folder, bad_values, read_weights
from rankfold.lora.files.checkpoint import file_tensors, fill, fitting
from rankfold.lora.files.old_experts import fused_tensors
from rankfold.lora.files.renames import renamed
from rankfold.lora.files.saved_embeddings import bring, embedding_tensors, find_brought
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.registry import adapter_layers, base_modules
from rankfold.lora.layers.saved import SavedModule
from rankfold.lora.placing.targets import find_targets
from rankfold.peft_surface.model import PeftModel
from rankfold.peft_surface.saving_and_loading import taken_from
from rankfold.peft_surface.tuner import LoraModel


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt the layers of ``model`` in place and return ``model`` itself; its configs are noted in
    ``model.peft_config``.  Calling it again adds another adapter, which becomes the active one.

    ``state_dict``: adapt exactly the modules that its keys name, whatever ``target_modules`` says, which is
    told; the values are not read.  With ``low_cpu_mem_usage`` the factors are on the meta device.
    Raises what ``get_peft_model`` raises; ``model`` is then as it was."""
    if state_dict is not None:
        peft_config = _with_targets_of(state_dict, peft_config, model)
    inner = unwrapped(model)
    if isinstance(inner, LoraModel):
        inner.add(adapter_name, peft_config, without_memory=low_cpu_mem_usage)
    else:
        LoraModel(inner, peft_config, adapter_name, low_cpu_mem_usage)
    return model


def _with_targets_of(tensors: Mapping[str, Tensor], config: LoraConfig, model: nn.Module) -> LoraConfig:
    """``config`` with exactly the targets that the keys of ``tensors`` name."""
    if config.target_parameters:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. "
            "This is not supported -- when using `target_parameters`, please inject the adapter without the "
            "state_dict."
        )
    keys = [key.removeprefix(PREFIX).replace(f"{COMPILED}.", "") for key in tensors if ".lora_" in key]
    paths = {re.split(r"\.lora_", key)[0].replace(".base_layer", "") for key in keys}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            meant = {*find_targets(model, config)}
    except NoMatchError:
        meant = set()
    modules = {path for path, _ in base_modules(model)}
    texts = []
    if more := sorted(meant - paths):
        texts.append(f"The PEFT config contained these additional target modules: {more}. ")
    if more := sorted((paths & modules) - meant):
        texts.append(f"The state_dict contained these additional target modules: {more}. ")
    if texts:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and "
            "the provided state_dict. This is not necessarily an issue and can be ignored if this was the "
            "intent. " + "".join(texts),
            RuntimeWarning,
            stacklevel=3,
        )
    exact = "|".join(re.escape(path) for path in sorted(paths))
    return replace(
        config, target_modules=exact, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, **_: Any
) -> None:
    """Make one adapter, or several whose updates are added, the active ones, trained unless
    ``inference_mode``.  What is merged is unmerged first.

    Raises ConfigError for an adapter that is not there, or several that cannot be active together."""
    tuner_of(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "lora_", **_: Any) -> list[str] | None:
    """Drop an adapter and its config, and return the names of those active now; None if it was the last
    one, of which nothing stays on the layers (PEFT leaves its wrappers and the config).

    ``prefix`` is PEFT's word and changes nothing.  Raises MergeError while it is merged."""
    tuner = tuner_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller is told by what is returned
        tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn half-precision and float8 factors and token rows of one adapter into float32, in place.

    Does nothing without ``autocast_adapter_dtype``.  ``modules_to_save`` and biases stay, as in PEFT."""
    tuner = tuner_of(model)
    tuner.check_known([adapter_name])
    for _, layer in adapter_layers(tuner.model):
        if isinstance(layer, (SavedModule, HeldParameters)) or not autocast_adapter_dtype:
            continue
        for parameter in _parameters(layer, adapter_name):
            if parameter.dtype in FLOATS and parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = parameter.data.float()


def set_requires_grad(
    model: nn.Module, adapter_names: str | Collection[str], requires_grad: bool = True
) -> None:
    """Train, or do not train, the tensors of the named adapters, active or not."""
    tuner_of(model).set_requires_grad(adapter_names, requires_grad)


def _parameters(layer: AdapterLayer, name: str) -> list[nn.Parameter]:
    tensors = layer.adapter_tensors(name).values() if name in layer.adapter_names() else ()
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of torch.compile, DDP and FSDP around it."""
    for name in (*WRAPPED, "module"):
        inner = model._modules.get(name)
        if inner is not None and len(model._modules) == 1:
            return unwrapped(inner)
    return model


def tuner_of(model: nn.Module) -> LoraModel:
    """The adapters of ``model``, wrapped or not."""
    if isinstance(model, PeftModel):
        return model.base_model
    return model if isinstance(model, LoraModel) else LoraModel.around(model)


def _prefix(model: nn.Module) -> str:
    """What precedes the dotted name of a base's module in the names of ``model``."""
    return "model." if isinstance(model, LoraModel) else "" if not isinstance(model, PeftModel) else PREFIX


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
    if state_dict is None and FULLY_SHARDED in model._modules:
        state_dict = model.state_dict()  # gathers what is cut
    model = unwrapped(model)
    tuner = tuner_of(model)
    tuner.check_known([adapter_name])
    inner, config = tuner.model, tuner.peft_config[adapter_name]
    tensors: dict[str, Tensor] = {**file_tensors(inner, adapter_name)}
    tensors |= embedding_tensors(inner, adapter_name, config, save_embedding_layers)
    if state_dict is not None:
        tensors = taken_from(state_dict, tensors, inner)
    return {_prefix(model) + key.removeprefix(PREFIX): tensor.detach() for key, tensor in tensors.items()}


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
    model = unwrapped(model)
    tuner, prefix = tuner_of(model), _prefix(model)
    tuner.check_known([adapter_name])
    inner, config = tuner.model, tuner.peft_config[adapter_name]
    given = {
        f"{PREFIX}{k.removeprefix(prefix).removeprefix(PREFIX)}": t for k, t in peft_model_state_dict.items()
    }
    tensors, _ = renamed(fused_tensors(config, given, inner), inner, {})
    wanted: dict[str, Tensor] = {**file_tensors(inner, adapter_name)}
    brought = find_brought(inner, tensors, wanted, config)
    fits, faults, result = fitting(tensors, wanted | {key: place for key, (_, place) in brought.items()})
    wrong = [text for fault, text in faults if fault == "shape"]
    refused = [] if ignore_mismatched_sizes else wrong
    refused += [text for _, text in bad_values(tensors)]
    if refused:
        raise AdapterError(bullet_list("the given tensors do not fit this model:", sorted(refused)))
    for key, tensor in fits.items():
        fill(wanted[key] if key in wanted else brought[key][1], tensor)
    bring(inner, adapter_name, dict(brought.values()))
    own = _set_base_biases(inner, {key: tensors[key] for key in result.unexpected_keys})
    result = LoadResult(result.missing_keys, [key for key in result.unexpected_keys if key not in own])
    if wrong:
        warnings.warn(
            bullet_list("Some weights were not loaded because their sizes did not match:", sorted(wrong)),
            stacklevel=3,
        )
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    missing = [names[id(wanted[key])] for key in result.missing_keys if id(wanted[key]) in names]
    return LoadResult(missing, [prefix + key.removeprefix(PREFIX) for key in result.unexpected_keys])


def _set_base_biases(model: nn.Module, given: Mapping[str, Tensor]) -> set[str]:
    """Set biases that no adapter here trains and that are given by the base's own names, as PEFT does, and
    say so; returns their keys."""
    parameters = dict(model.named_parameters())
    own = {
        key: parameters[path]
        for key, tensor in given.items()
        if (path := key.removeprefix(PREFIX).replace(".base_layer.", ".")) in parameters
        and path.endswith("bias")
        and parameters[path].shape == tensor.shape
    }
    for key, parameter in own.items():
        fill(parameter, given[key])
    if own:
        headline = "the base's own biases were set, as no adapter here trains them:"
        warnings.warn(bullet_list(headline, sorted(own), shown=3), RankfoldWarning, stacklevel=4)
    return {*own}


def load_peft_weights(model_id: str | Path, device: str | None = None, **options: Any) -> dict[str, Tensor]:
    """The tensors in an adapter folder or a repository of the hub, on ``device``; ``options`` are
    LoadOptions.

    Raises AdapterError."""
    tensors, _, _ = read_weights(adapter_folder(model_id, options))
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base as it would be without adapters, under the base's own names."""
    return {name: tensor.detach() for name, tensor in _base_state(tuner_of(model).model).items()}


@torch.no_grad()
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Put values into the base of an adapted model, by the base's own names.

    Raises AdapterError for a tensor of another shape, and with ``strict`` for a missing or an unknown name;
    nothing is changed then."""
    places = _base_state(tuner_of(model).model)
    missing = [name for name in places if name not in state_dict]
    unexpected = [name for name in state_dict if name not in places]
    wrong = [f"Missing key: {name}" for name in missing if strict]
    wrong += [f"Unexpected key: {name}" for name in unexpected if strict]
    wrong += [
        f"size mismatch for {name}: {tuple(state_dict[name].shape)} in place of {tuple(place.shape)}"
        for name, place in places.items()
        if name in state_dict and state_dict[name].shape != place.shape
    ]
    if wrong:
        raise AdapterError(bullet_list("this state dict does not fit the base:", wrong))
    for name, place in places.items():
        if name in state_dict:
            place.copy_(state_dict[name])
    return LoadResult(missing, unexpected)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base's own state dict, not detached: what no adapter has added."""
    found: dict[str, Tensor] = {}
    for path, module in base_modules(model):
        added = type(module).added if isinstance(module, AdapterLayer) else ()
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None and key not in added:
                found[f"{path}.{key}" if path else key] = tensor
    return found
