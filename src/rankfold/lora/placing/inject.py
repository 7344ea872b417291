"""Placing adapters into a model and taking them out again."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.base import (
    LORA_CLASSES,
    AdapterLayer,
    AdapterSpec,
    adapt,
    adapter_layers,
    base_modules,
    lora_class,
    restore,
)
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.init import start_problems, tied_problems
from rankfold.lora.placing.targets import pattern_value


def inject(
    model: nn.Module, targets: Collection[str], config: LoraConfig, name: str, *, widen: bool = True
) -> None:
    """Add the adapter ``name`` to the named modules, in place; no other parameter is touched.

    Raises TargetError listing every target that is not a supported layer, ConfigError listing every layer
    that cannot carry such an adapter, before anything is changed."""
    modules = dict(base_modules(model))
    check_targets({target: modules[target] for target in targets})
    specs = {
        target: AdapterSpec(name, target, rank_of(target, config), alpha_of(target, config), config, widen)
        for target in targets
    }
    check_layers(modules, specs)
    with torch.no_grad():
        for target, spec in specs.items():
            adapt(modules[target]).add_adapter(spec)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Thousands of new small objects set the collector off again and again, to find
    nothing: all of them stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # else somebody has frozen objects, and wants them to stay so
                gc.freeze()
                gc.unfreeze()  # both at once call all that is there old, without a look at it
            gc.enable()


def freeze(model: nn.Module) -> None:
    """Train nothing that belongs to the base."""
    for _, module in base_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


def activate(model: nn.Module, names: Collection[str], *, trainable: bool) -> None:
    """Make ``names`` the active adapters of ``model``; of all adapters only they may be trained."""
    for _, layer in adapter_layers(model):
        layer.set_adapters(names)
        for name in layer.adapter_names():
            trained = trainable and name in names
            for parameter in layer.adapter_tensors(name).values():
                if parameter.requires_grad is not trained and _is_trainable(parameter):
                    parameter.requires_grad_(trained)


def _is_trainable(tensor: Tensor) -> bool:
    """Whether ``tensor`` is no buffer, such as a running mean, of a module that an adapter copied."""
    return tensor.is_floating_point() and isinstance(tensor, nn.Parameter)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Drop one adapter; a layer that carries no other becomes plain again."""
    for _, layer in list(adapter_layers(model)):
        if name in layer.adapter_names():
            layer.delete_adapter(name)
        if not layer.adapter_names():
            restore(layer)


def remove(model: nn.Module) -> None:
    """Drop all adapters and turn the layers back into plain ones."""
    for _, layer in reversed(list(adapter_layers(model))):
        if layer.merged:
            layer.unmerge()
        restore(layer)


def check_targets(targets: Mapping[str, nn.Module]) -> None:
    """Raise TargetError listing every target that no LoRA class is for."""
    wrong = []
    for name, module in targets.items():
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            parent = name.rpartition(".")[0]
            wrong.append(
                f"{name} is a part of an attention layer that never calls it; target {parent!r} instead"
            )
        elif not isinstance(module, LoraLayer) and lora_class(type(module)) is None:
            wrong.append(f"{name} is a {type(module).__name__}")
    if wrong:
        kinds = [kind if isinstance(kind, str) else kind.__name__ for kind in LORA_CLASSES]
        supported = ", ".join(kind.rpartition(".")[2] for kind in kinds)
        headline = f"these targets are not layers that can be adapted ({supported}):"
        raise TargetError(bullet_list(headline, wrong))


def check_layers(modules: Mapping[str, nn.Module], specs: Mapping[str, AdapterSpec]) -> None:
    """Raise ConfigError listing what keeps a layer from carrying its adapter."""
    wrong = []
    for target, spec in specs.items():
        module = modules[target]
        kind = type(module) if isinstance(module, AdapterLayer) else lora_class(type(module))
        kind = cast(type[AdapterLayer], kind)
        problems = kind.problems(module, spec) or start_problems(kind, module, spec)
        if replaced_forward(module):
            problems = [*problems, "its forward was replaced on the object itself: no adapter gets past that"]
        wrong += [f"{target}: {problem}" for problem in problems]
    wrong += tied_problems(modules, specs)
    if wrong:
        raise ConfigError(bullet_list("these layers cannot carry this adapter:", wrong))


def replaced_forward(layer: nn.Module) -> bool:
    """Whether the object holds a ``forward`` of its own that does not end in that of its class."""
    innermost = layer.__dict__.get("_old_forward", layer.__dict__.get("forward"))
    return innermost is not None and getattr(innermost, "__func__", None) is not type(layer).forward


def check_ranks(targets: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Raise ConfigError listing every target whose weight is smaller than the rank asked for it."""
    too_large = []
    for name, module in targets.items():
        rank, own = rank_of(name, config), module._parameters
        weight = own["in_proj_weight"] if "in_proj_weight" in own else getattr(module, "weight", None)
        # A 4-bit weight (which has a quant_state) may be stored as floats, but not in its own shape.
        if isinstance(weight, Tensor) and weight.is_floating_point() and not hasattr(weight, "quant_state"):
            rows, columns = weight.shape[0], weight.shape[1:].numel() * getattr(module, "groups", 1)
            if rank > min(rows, columns):
                too_large.append(f"{name}: rank {rank} on a {rows}x{columns} weight")
    if too_large:
        raise ConfigError(bullet_list("the rank exceeds what these weights can hold:", too_large))


def rank_of(target: str, config: LoraConfig) -> int:
    return int(pattern_value(target, dict(config.rank_pattern), config.r))


def alpha_of(target: str, config: LoraConfig) -> float:
    return pattern_value(target, config.alpha_pattern, config.lora_alpha)
