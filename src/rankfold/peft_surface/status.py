"""What is on a model and in which state: PEFT's ``get_layer_status`` and ``get_model_status``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from rankfold.errors import AdapterError
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.overrides import HeldParameters, file_path
from rankfold.lora.layers.parameters import ParameterAdapters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.layers.saved import SavedModule
from rankfold.lora.layers.tokens import TokenLayer
from rankfold.peft_surface.findings import count_parameters
from rankfold.peft_surface.model import PeftModel

Irregular = Literal["irregular"]
T = TypeVar("T")


@dataclass
class TunerLayerStatus:
    """One adapted layer; the fields of PEFT's class of this name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapted layers taken together; the fields of PEFT's class of this name.  "irregular" stands
    where the layers do not agree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted layer, of a wrapped model or any other, under PEFT's name for it.

    Raises AdapterError if there is none."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = "model." if isinstance(model, PeftModel) else ""
    layers = [
        status
        for path, layer in adapter_layers(inner)
        if not isinstance(layer, HeldParameters)
        for status in _layer_status(f"{prefix}{file_path(inner, path)}", layer)
    ]
    if not layers:
        raise AdapterError("No adapter layers found in the model, so there is no state to tell")
    return layers


def _layer_status(name: str, layer: AdapterLayer) -> Iterator[TunerLayerStatus]:
    if isinstance(layer, ParameterAdapters):
        # PEFT puts a wrapper around a wrapper, the last parameter's outermost.
        for depth, part in enumerate(reversed(list(layer.parameter_factors().values()))):
            yield _status(f"{name}{'.base_layer' * depth}", "lora.ParamWrapper", part, layer)
    elif isinstance(layer, TokenLayer):
        yield _status(f"{name}.token_adapter", "TrainableTokensLayer", layer, layer)
    elif isinstance(layer, SavedModule):
        yield _status(name, "ModulesToSaveWrapper", layer, layer)
    else:
        yield _status(name, getattr(layer, "peft_name", type(layer).__name__), layer, layer)


def _status(name: str, kind: str, part: AdapterLayer, layer: AdapterLayer) -> TunerLayerStatus:
    tensors = {
        adapter: [t for t in part.adapter_tensors(adapter).values() if isinstance(t, nn.Parameter)]
        for adapter in part.adapter_names()
    }
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={k: _common([t.requires_grad for t in ts]) for k, ts in tensors.items() if ts},
        available_adapters=sorted(tensors),
        devices={k: sorted({t.device.type for t in ts}) for k, ts in tensors.items() if ts},
        quantization_backend=getattr(layer, "quantization_backend", None),
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the adapters of a model, wrapped or not.

    Raises AdapterError if it carries none."""
    layers = get_layer_status(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    half = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=_base_type(model),
        adapter_model_type=type(model.base_model).__name__ if isinstance(model, PeftModel) else "None",
        peft_types=dict.fromkeys(model.peft_config, "LORA") if isinstance(model, PeftModel) else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common([layer.enabled for layer in layers]),
        active_adapters=_agreed(layers, lambda layer: tuple(layer.active_adapters), list),
        merged_adapters="irregular" if half else sorted(merged),
        requires_grad={k: _common(v) for k, v in _collected(layer.requires_grad for layer in layers).items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in found for device in devices})
            for name, found in _collected(layer.devices for layer in layers).items()
        },
        quantization_backend=_agreed(layers, lambda layer: layer.quantization_backend, lambda value: value),
    )


def _common(values: list[Any]) -> bool | Irregular:
    if all(value is True for value in values):
        return True
    return False if all(value is False for value in values) else "irregular"


def _agreed(
    layers: list[TunerLayerStatus],
    read: Callable[[TunerLayerStatus], Hashable],
    finish: Callable[[Any], T],
) -> T | Irregular:
    values = {read(layer) for layer in layers}
    return finish(values.pop()) if len(values) == 1 else "irregular"


def _collected(tables: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for table in tables:
        for name, value in table.items():
            found.setdefault(name, []).append(value)
    return found


def _base_type(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        return type(model.get_base_model()).__name__
    from_transformers = any(
        (kind.__module__, kind.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        for kind in type(model).__mro__
    )
    return type(model).__name__ if from_transformers else "other"
