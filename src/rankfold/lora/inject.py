"""Placing adapters into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from rankfold.errors import ConfigError, TargetError, bullet_list
from rankfold.lora.config import LoraConfig
from rankfold.lora.factors import LoraLayer
from rankfold.lora.layers import LORA_CLASSES, AdapterSpec, adapt, adapter_layers, lora_class, restore
from rankfold.lora.targets import pattern_value


def inject(
    model: nn.Module, targets: Collection[str], config: LoraConfig, name: str, *, widen: bool = True
) -> None:
    """Add the adapter ``name`` to the named modules, in place; no other parameter is touched.

    Raises TargetError listing every target that is not a supported layer, before anything is changed."""
    modules = dict(model.named_modules())
    check_targets({target: modules[target] for target in targets})
    for target in targets:
        layer = adapt(modules[target])
        rank, alpha = rank_of(target, config), alpha_of(target, config)
        layer.add_adapter(AdapterSpec(name, target, rank, alpha, config, widen))


def freeze(model: nn.Module) -> None:
    """Train nothing."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def activate(model: nn.Module, names: Collection[str], *, trainable: bool) -> None:
    """Make ``names`` the active adapters of ``model``; of all adapters only they may be trained."""
    for _, layer in adapter_layers(model):
        layer.set_adapters(names)
        for name in layer.adapter_names():
            for parameter in layer.adapter_tensors(name).values():
                if parameter.is_floating_point():
                    parameter.requires_grad_(trainable and name in names)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Drop one adapter; a layer that carries no other becomes plain again."""
    for _, layer in list(adapter_layers(model)):
        if name in layer.adapter_names():
            layer.delete_adapter(name)
        if not layer.adapter_names():
            restore(layer)


def remove(model: nn.Module) -> None:
    """Drop all adapters and turn the layers back into plain ones."""
    for _, layer in list(adapter_layers(model)):
        if layer.merged:
            layer.unmerge()
        restore(layer)


def check_targets(targets: dict[str, nn.Module]) -> None:
    """Raise TargetError listing every target that no LoRA class is for."""
    wrong = []
    for name, module in targets.items():
        if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
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


def check_ranks(model: nn.Module, targets: Collection[str], config: LoraConfig) -> None:
    """Raise ConfigError listing every target whose weight is smaller than the rank asked for it."""
    too_large = []
    for name in targets:
        weight, rank = getattr(model.get_submodule(name), "weight", None), rank_of(name, config)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            rows, columns = weight.shape[0], weight[0].numel()
            if rank > min(rows, columns):
                too_large.append(f"{name}: rank {rank} on a {rows}x{columns} weight")
    if too_large:
        raise ConfigError(bullet_list("the rank exceeds what these weights can hold:", too_large))


def rank_of(target: str, config: LoraConfig) -> int:
    return int(pattern_value(target, dict(config.rank_pattern), config.r))


def alpha_of(target: str, config: LoraConfig) -> float:
    return pattern_value(target, config.alpha_pattern, config.lora_alpha)
