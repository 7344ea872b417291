"""Where an adapter goes on a model: found and checked as a whole, then put there."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rankfold.compat import HOOKED_FORWARD
from rankfold.errors import ConfigError, RankfoldWarning, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import check_adapter_name
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import (
    LORA_CLASSES,
    adapt,
    adapter_layers,
    base_modules,
    lora_class,
    restore,
)
from rankfold.lora.layers.saved import with_task_modules
from rankfold.lora.placing.non_lora_params import NonLoraParams, find_non_lora_params, place_non_lora_params
from rankfold.lora.placing.parameter_targets import checked_parameters, inject_parameters, owners_of
from rankfold.lora.placing.read_weights import shown_class
from rankfold.lora.placing.targets import (
    ALL_LINEAR,
    alpha_of,
    find_targets,
    module_names,
    rank_of,
    resolve,
    shortest_list,
)
from rankfold.lora.placing.ties import find_heads, place_heads, spelt_with_leaders, with_leaders
from rankfold.lora.starts.parts import check_gathered, needs_weight
from rankfold.storage.layers import HeldLayer


@dataclass(frozen=True)
class Placement:
    """Where one adapter goes, all of it checked.

    ``config`` is the model's own copy, ``targets`` the modules that get factors, ``heads`` the tied modules
    that follow one of these, ``parameters`` what ``target_parameters`` means."""

    config: LoraConfig
    targets: list[str]
    heads: dict[str, str]
    parameters: list[str]
    others: NonLoraParams


def find_placement(
    model: nn.Module, given: LoraConfig, name: str, taken: Mapping[str, LoraConfig], *, new: bool = True
) -> Placement:
    """Where the adapter ``name`` goes on a model with the adapters ``taken``; the model is only looked at.

    A ``new`` adapter's config is spelt out for this model, and what of it has no effect is told; one from a
    file is taken as it is.  Raises TargetError or ConfigError listing all that does not fit."""
    config = with_task_modules(given)
    check_adapter_name(name, taken)
    modules = dict(base_modules(model))
    targets = _without_parts(find_targets(model, config, new=new), modules)
    heads = find_heads(model, targets, config)
    targets = with_leaders(targets, heads)
    layers = {target: modules[target] for target in targets}
    check_targets(layers, config)
    parameters = checked_parameters(model, targets, config)
    check_layers(modules, _specs(targets, config, name))
    others = find_non_lora_params(model, [*targets, *owners_of(parameters)], config, taken, new=new)
    if new:
        check_gathered(layers, config)
        config = _spelt_out(model, config, targets, heads, layers)
        _tell_large_ranks(layers, config)
        _tell_running_statistics(modules, others)
        _tell_layers(layers, config)
    return Placement(config, targets, heads, parameters, others)


def place(
    model: nn.Module, placement: Placement, name: str, *, widen: bool = True, without_memory: bool = False
) -> None:
    """Put the adapter ``name`` where ``placement`` says, in place; no other parameter is touched.

    With ``widen`` the factors of half-precision layers are float32, ``without_memory`` they are on the meta
    device."""
    modules, config = dict(base_modules(model)), placement.config
    specs = _specs(placement.targets, config, name, widen=widen, without_memory=without_memory)
    for target, spec in specs.items():
        adapt(modules[target], layer_class(modules, target, config)).add_adapter(spec)
    place_heads(model, placement.heads, config, name)
    inject_parameters(model, placement.parameters, config, name, widen=widen, without_memory=without_memory)
    place_non_lora_params(model, placement.others, name, config, widen=widen)


def _specs(targets: Iterable[str], config: LoraConfig, name: str, **memory: bool) -> dict[str, AdapterSpec]:
    return {
        target: AdapterSpec(name, target, rank_of(target, config), alpha_of(target, config), config, **memory)
        for target in targets
    }


def _without_parts(targets: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """``targets`` without the output projections of attention layers that are targets themselves: such a
    layer adapts both of its weights."""
    return [
        target
        for target in targets
        if not (
            (parent := target.rpartition(".")[0]) in targets
            and isinstance(modules[parent], nn.MultiheadAttention)
        )
    ]


def _spelt_out(
    model: nn.Module,
    given: LoraConfig,
    targets: list[str],
    heads: Mapping[str, str],
    layers: Mapping[str, nn.Module],
) -> LoraConfig:
    """The model's own copy of the config, with what it leaves to the model."""
    wanted, changes = given.target_modules, cast(dict[str, Any], {})
    if wanted is None:
        usual = resolve(model, given)
        changes = {"target_modules": usual if isinstance(usual, str) else {*usual}} if usual else {}
    elif isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        changes = {"target_modules": shortest_list(targets, module_names(model)), "exclude_modules": None}
    config = given.replaced(**changes)
    if heads and config.target_modules:
        config.target_modules = spelt_with_leaders(config.target_modules, heads)
    config.fan_in_fan_out = _fan_in_fan_out(layers.values(), given)
    known = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "name_or_path", None
    )
    told = config.base_model_name_or_path
    if told and known and told != known:
        warnings.warn(
            f"The base model name of this config was renamed from '{told}' to '{known}', which the model has",
            RankfoldWarning,
            stacklevel=5,
        )
    config.base_model_name_or_path = known or told or None
    if config.task_type is None:
        kind = getattr(type(model), "__mro__", [type(model)])[0]
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def _fan_in_fan_out(layers: Iterable[nn.Module], config: LoraConfig) -> bool:
    """True where every linear target is a transformers Conv1D, as PEFT writes it."""
    kinds = {type(layer) for layer in layers}
    linear = {kind for kind in kinds if issubclass(kind, nn.Linear)}
    transposed = {kind for kind in kinds if any(k.__name__ == "Conv1D" for k in kind.__mro__)}
    return not linear if linear or transposed else config.fan_in_fan_out


def _tell_large_ranks(targets: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Warn where a rank is larger than the weight's dimensions, so that a smaller one would say the same."""
    too_large = []
    for name, module in targets.items():
        rank, (rows, columns) = rank_of(name, config), _matrix_of(module)
        if rank > min(rows, columns):
            too_large.append(f"{name}: rank {rank} on a {rows}x{columns} weight")
    if too_large:
        headline = "the rank exceeds what these weights can hold, and costs more than it can bring:"
        warnings.warn(bullet_list(headline, too_large, shown=3), stacklevel=5)


def _matrix_of(module: nn.Module) -> Sequence[int]:
    """The rows and columns of the weight that an adapter is added to, taken as a matrix."""
    if isinstance(module, HeldLayer):
        return module.shape
    if isinstance(module, nn.Linear):  # whose weight may be stored in another shape
        return module.out_features, module.in_features
    name = "in_proj_weight" if "in_proj_weight" in module._parameters else "weight"
    weight = cast(Tensor, getattr(module, name))
    return weight.shape[0], weight.shape[1:].numel() * cast(int, getattr(module, "groups", 1))


def _tell_running_statistics(modules: Mapping[str, nn.Module], others: NonLoraParams) -> None:
    """Warn of statistics that training changes and no adapter file holds."""
    changing = [
        path
        for path, module in modules.items()
        if getattr(module, "track_running_stats", False)
        and module._buffers.get("running_mean") is not None
        and not any(f"{path}.".startswith(f"{saved}.") for saved in others.saved)
    ]
    if changing:
        warnings.warn(
            f"training mode changes the running statistics of {len(changing)} normalisation layers of the "
            f"base ({', '.join(changing[:3])}), which are no part of the adapter: name them in "
            "modules_to_save to save them with it, or keep these layers in eval mode",
            stacklevel=5,
        )


def _tell_layers(targets: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Warn of what can be trained so, and not merged, and of layers that only the caller knows."""
    plain = {name: getattr(module, "plain_class", type(module)) for name, module in targets.items()}
    without = [name for name, module in targets.items() if getattr(module, "bias", None) is None]
    if config.lora_bias and without:
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {plain[without[0]].__name__} has "
            "no bias. This means that merging LoRA weights won't be possible.",
            RankfoldWarning,
            stacklevel=5,
        )
    if config.lora_dropout and (
        whole := [n for n, m in targets.items() if isinstance(m, nn.MultiheadAttention)]
    ):
        warnings.warn(
            f"lora_dropout has no effect on {', '.join(whole[:3])}: attention takes the weight with the "
            "update in it",
            RankfoldWarning,
            stacklevel=5,
        )
    for kind in dict.fromkeys(plain.values()):
        if issubclass(kind, tuple(config.custom_modules)) and lora_class(kind) is None:
            warnings.warn(
                f"Unsupported layer type '{kind}' encountered, proceed at your own risk.", stacklevel=5
            )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Thousands of new small objects set the collector off again and again, to find nothing: all stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def freeze(model: nn.Module) -> None:
    """Train nothing that belongs to the base."""
    for _, module in base_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


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


def layer_class(
    modules: Mapping[str, nn.Module], target: str, config: LoraConfig
) -> type[AdapterLayer] | None:
    """The class that the layer ``target`` becomes; None for the one that its own class is listed with."""
    layer = modules[target]
    kind = layer.plain_class if isinstance(layer, AdapterLayer) else type(layer)
    custom = next((own for plain, own in config.custom_modules.items() if issubclass(kind, plain)), None)
    return custom or shown_class(modules, target)


def check_targets(targets: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Raise TargetError listing every target that no LoRA class is for."""
    wrong = [
        f"{name} is a {type(module).__name__}"
        for name, module in targets.items()
        if not isinstance(module, LoraLayer)
        and lora_class(type(module)) is None
        and not isinstance(module, tuple(config.custom_modules))
    ]
    if wrong:
        kinds = [kind if isinstance(kind, str) else kind.__name__ for kind in LORA_CLASSES]
        supported = ", ".join(kind.rpartition(".")[2] for kind in kinds)
        headline = (
            "these targets are not layers that can be adapted. Currently, only the following modules are "
            f"supported: {supported}"
        )
        raise TargetError(bullet_list(headline, [f"Target module {text} is not supported" for text in wrong]))


def check_layers(modules: Mapping[str, nn.Module], specs: Mapping[str, AdapterSpec]) -> None:
    """Raise ConfigError listing what keeps a layer from carrying its adapter."""
    wrong, uses = [], Counter(id(p) for module in modules.values() for p in module._parameters.values())
    for target, spec in specs.items():
        module = modules[target]
        kind = type(module) if isinstance(module, AdapterLayer) else lora_class(type(module))
        kind = layer_class(modules, target, spec.config) or kind
        problems = cast(type[AdapterLayer], kind).problems(module, spec)
        if replaced_forward(module):
            problems = [*problems, "its forward was replaced on the object itself: no adapter gets past that"]
        if needs_weight(module, spec.config) and uses[id(module._parameters.get("weight"))] > 1:
            problems = [
                *problems,
                "its weight is tied to another module's, which this start would change too",
            ]
        wrong += [f"{target}: {problem}" for problem in problems]
    if wrong:
        raise ConfigError(bullet_list("these layers cannot carry this adapter:", wrong))


def replaced_forward(layer: nn.Module) -> bool:
    """Whether the object holds a ``forward`` of its own that does not end in that of its class."""
    innermost = layer.__dict__.get(HOOKED_FORWARD, layer.__dict__.get("forward"))
    return innermost is not None and getattr(innermost, "__func__", None) is not type(layer).forward


def trained_names(model: nn.Module) -> set[str]:
    """The adapters of which some tensor is trained."""
    return {
        name
        for _, layer in adapter_layers(model)
        for name in layer.adapter_names()
        if any(isinstance(t, Tensor) and t.requires_grad for t in layer.adapter_tensors(name).values())
    }


def activate(
    layers: Iterable[AdapterLayer],
    names: Collection[str],
    *,
    trained: Collection[str],
    frozen: Collection[str],
) -> None:
    """Make ``names`` the active adapters of ``layers``; ``trained`` are trained now, ``frozen`` not."""
    for layer in layers:
        if frozen:
            layer.set_requires_grad(frozen, False)
        if trained:
            layer.set_requires_grad(trained)
        layer.activate(list(names))
