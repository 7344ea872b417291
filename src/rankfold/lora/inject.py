"""Placing adapters into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, MergeError, TargetError, bullet_list
from rankfold.lora.config import LoraConfig
from rankfold.lora.layers import LORA_CLASSES, LoraLinear, adapt, restore
from rankfold.lora.targets import pattern_value


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every LoRA layer of ``model`` with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def inject(model: nn.Module, targets: list[str], config: LoraConfig, adapter_name: str) -> None:
    """Adapt the named modules in place and freeze everything but the new factors.

    Raises TargetError listing every target that is not a supported layer, before anything is changed."""
    modules = dict(model.named_modules())
    _check_before_change({name: modules[name] for name in targets})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in targets:
        layer = adapt(modules[name])
        layer.add_adapter(adapter_name, _rank(name, config), _alpha(name, config), config)
    for parameter in adapter_parameters(model, adapter_name).values():
        parameter.requires_grad_(not config.inference_mode)


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """``<module>.lora_A.weight`` and ``<module>.lora_B.weight`` of one adapter, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(model):
        if adapter_name in layer.r:
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.factors(adapter_name)
    return found


@torch.no_grad()
def merge_and_restore(model: nn.Module) -> None:
    """Fold every active adapter into its weight and turn the LoRA layers back into plain ones.

    All merged weights are checked before the first one replaces a base weight.
    Raises MergeError naming every layer that cannot be merged; the model is then as it was."""
    layers = dict(lora_layers(model))
    problems = _shared_weights(model, layers)
    for name, layer in layers.items():
        try:
            layer.merged_weight()
        except MergeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise MergeError(bullet_list("nothing was merged:", problems))
    for layer in layers.values():
        layer.weight.copy_(layer.merged_weight())
        restore(layer)


def remove(model: nn.Module) -> None:
    """Drop all adapters and turn the LoRA layers back into plain ones."""
    for _, layer in list(lora_layers(model)):
        restore(layer)


def check_ranks(model: nn.Module, targets: list[str], config: LoraConfig) -> None:
    """Raise ConfigError listing every target whose weight is smaller than the rank asked for it."""
    too_large = []
    for name in targets:
        weight, rank = model.get_submodule(name).weight, _rank(name, config)
        if isinstance(weight, Tensor) and rank > min(weight.shape):
            too_large.append(f"{name}: rank {rank} on a {weight.shape[0]}x{weight.shape[1]} weight")
    if too_large:
        raise ConfigError(bullet_list("the rank exceeds what these weights can hold:", too_large))


def _shared_weights(model: nn.Module, layers: dict[str, LoraLinear]) -> list[str]:
    owners = {id(layer.weight): (name, layer) for name, layer in layers.items()}
    problems = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owner_name, owner = owners.get(id(parameter), (name, module))
            if owner is not module:
                problems.append(
                    f"{owner_name}.weight is tied to {name}.{key}, which merging would change too"
                )
    return problems


def _check_before_change(targets: dict[str, nn.Module]) -> None:
    wrong_types = [
        f"{name} is a {type(module).__name__}"
        for name, module in targets.items()
        if type(module) not in LORA_CLASSES
    ]
    if wrong_types:
        supported = ", ".join(kind.__name__ for kind in LORA_CLASSES)
        headline = f"these targets are not layers that this version adapts ({supported}):"
        raise TargetError(bullet_list(headline, wrong_types))


def _rank(name: str, config: LoraConfig) -> int:
    return int(pattern_value(name, dict(config.rank_pattern), config.r))


def _alpha(name: str, config: LoraConfig) -> float:
    return pattern_value(name, config.alpha_pattern, config.lora_alpha)
