"""Which parameters can carry adapters, and putting the adapters there."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from rankfold.errors import ConfigError, TargetError, bullet_list
from rankfold.kernels.experts import MATRIX
from rankfold.lora.config.data_starts import start_from_data
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.variant_configs import VARIANTS
from rankfold.lora.layers.base import HALF_DTYPES, AdapterLayer, AdapterSpec
from rankfold.lora.layers.parameters import ParameterAdapters, adapt_parameter, base_value
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.placing.targets import alpha_of, find_parameters, rank_of

# What an adapted module has that a plain one has not; a module of any class may be adapted.
ADAPTER_WORDS = {*dir(ParameterAdapters), *ParameterAdapters.added} - {*dir(nn.Module)}
# Recurrent layers keep a second list of their weights, scripted ones cannot change class.
UNREADING = (nn.RNNBase, torch.jit.ScriptModule)
FLOATS = (*HALF_DTYPES, torch.float32, torch.float64)


def parameter_targets(model: nn.Module) -> list[str]:
    """The dotted names of all parameters of ``model`` that carry adapters."""
    owners = ((path, layer) for path, layer in adapter_layers(model) if isinstance(layer, ParameterAdapters))
    return [f"{path}.{name}" for path, layer in owners for name in layer.parameter_factors()]


def checked_parameters(model: nn.Module, targets: Collection[str], config: LoraConfig) -> list[str]:
    """The parameters that ``target_parameters`` means, all of them fit for adapters; ``targets`` are the
    modules that the same adapter adapts.

    Raises listing every parameter that cannot be adapted (TargetError) and every option that has no
    meaning for one (ConfigError)."""
    parameters = find_parameters(model, config)
    options = _wrong_options(config) if parameters else []
    wrong = [f"{name} {problem}" for name in parameters for problem in _problems(model, name, targets)]
    if options or wrong:
        kind = ConfigError if options else TargetError
        raise kind(bullet_list("target_parameters cannot be used in this way:", [*options, *wrong]))
    return parameters


def owners_of(parameters: Collection[str]) -> list[str]:
    """The dotted names of the modules that the parameters belong to."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _wrong_options(config: LoraConfig) -> list[str]:
    names = [
        n
        for n in ("lora_dropout", "lora_bias", "use_dora", "fan_in_fan_out", *VARIANTS)
        if getattr(config, n)
    ]
    if config.inference_mode and "lora_dropout" in names:
        names.remove("lora_dropout")  # without training it is never used
    start = config.init_lora_weights
    if not isinstance(start, bool) and start != "gaussian" and not start_from_data(start):
        names.append("init_lora_weights")
    return [
        f"lora.ParamWrapper does not work with {name}={getattr(config, name)!r}: it does not work with "
        "target_parameters"
        for name in names
    ]


def _problems(model: nn.Module, target: str, targets: Collection[str]) -> list[str]:
    """What keeps a parameter from carrying an adapter, the weightiest reason only."""
    path, _, name = target.rpartition(".")
    owner = model.get_submodule(path)
    value, kind, is_adapted = base_value(owner, name), type(owner).__name__, isinstance(owner, AdapterLayer)
    hidden = sorted({*dir(owner)} & ADAPTER_WORDS) if not is_adapted else []
    other_kind = is_adapted and not isinstance(owner, ParameterAdapters)
    problems = {
        "belongs to the model itself: Targeting an nn.Parameter on the top-level module is not supported "
        f"(parameter '{name}'): PEFT's files have no name for it": not path,
        f"belongs to {path}, which target_modules means too. Trying to wrap an `nn.Parameter` of layer "
        f"'{path}' of "
        f"type {kind.removeprefix('Lora')}, which is not a valid target.": path in targets,
        f"belongs to {path}, which carries another kind of adapter already ({kind})": other_kind,
        f"belongs to a {kind}, which does not read it as an attribute": isinstance(owner, UNREADING),
        f"has {value.dim()} dimensions; it takes 2 or 3": value.dim() not in (MATRIX, MATRIX + 1),
        f"holds {value.dtype}; it takes float16, bfloat16, float32 or float64": value.dtype not in FLOATS,
        f"belongs to {path}, whose own {', '.join(hidden)} an adapter would hide": bool(hidden),
    }
    return [problem for problem, holds in problems.items() if holds][:1]


def inject_parameters(
    model: nn.Module, parameters: Collection[str], config: LoraConfig, name: str, **memory: bool
) -> None:
    """Add the adapter ``name`` to the parameters of these dotted names, all of them found fit for it;
    ``memory`` are words of AdapterSpec."""
    for target in parameters:
        path, _, own = target.rpartition(".")
        rank, alpha = rank_of(target, config), alpha_of(target, config)
        owner = adapt_parameter(model.get_submodule(path), own)
        owner.add_adapter(AdapterSpec(name, target, rank, alpha, config, **memory))
