"""What an adapter trains beside low-rank factors, found, checked and put in place together: saved modules,
token rows and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast
from warnings import warn

from torch import Tensor, nn

from rankfold.errors import ConfigError, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.base import AdapterLayer, adapter_layers, base_modules
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.overrides import hold
from rankfold.lora.layers.saved import SavedModule, find_saved, find_ties, place_saved, wrong_saved
from rankfold.lora.layers.tokens import TokenLayer, find_followers, find_tokens, place_tokens, wrong_tokens


@dataclass(frozen=True)
class Extras:
    """What one adapter trains beside its factors, found and checked; ``biases`` only says which."""

    saved: dict[str, nn.Module] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)
    biases: str = "none"


def find_extras(
    model: nn.Module,
    targets: Collection[str],
    config: LoraConfig,
    taken: Mapping[str, LoraConfig],
    *,
    every_entry: bool = False,
) -> Extras:
    """What ``config`` trains beside the factors of ``targets``, on a model with the adapters ``taken``.

    Raises TargetError or ConfigError listing all that does not fit, before anything is changed."""
    asked = (config.modules_to_save, config.trainable_token_indices, config.ensure_weight_tying)
    if not taken and not any(asked) and config.bias == "none":
        return Extras()
    with_bias = [name for name, other in taken.items() if other.bias != "none"]
    if config.bias != "none" and with_bias:
        raise ConfigError(f"adapter {with_bias[0]!r} trains biases already; only one adapter may, with bias")
    modules = dict(base_modules(model))
    problems = [
        f"{path} is a target, and another adapter trains it as a whole or by rows"
        for path in targets
        if isinstance(modules.get(path), (SavedModule, TokenLayer))
    ]
    saved, tokens = find_saved(model, config), find_tokens(model, config)
    ties = find_ties(model, saved) if config.ensure_weight_tying else {}
    saved |= {p: modules[p] for p in dict.fromkeys([*ties.values(), *ties])}
    followers = find_followers(model, tokens) if tokens else {}
    problems += wrong_saved(saved, ties, config, every_entry=every_entry)
    problems += wrong_tokens(model, tokens, followers, config)
    problems += _meeting(targets, saved, {**tokens, **followers})
    if every_entry and config.bias != "none" and not _with_bias(model, config, saved, targets):
        problems.append(f"bias={config.bias!r} trains biases, and there is none to train")
    if config.ensure_weight_tying:
        problems += _wrong_ties(modules, targets, tokens, {**ties, **followers}, every_entry=every_entry)
    if problems:
        raise TargetError(bullet_list("this adapter does not fit the model:", problems))
    if every_entry and not config.ensure_weight_tying:
        _warn_of_ties(model, saved)
    return Extras(saved, ties, tokens, followers, config.bias)


def _wrong_ties(
    modules: Mapping[str, nn.Module],
    targets: Collection[str],
    tokens: Mapping[str, list[int]],
    tied: Mapping[str, str],
    *,
    every_entry: bool,
) -> list[str]:
    """What keeps ``ensure_weight_tying`` from being kept."""
    problems = []
    for path, indices in tokens.items():
        weight = modules[path]._parameters.get("weight")
        others = [p for p in tokens if p != path and modules[p]._parameters.get("weight") is weight]
        problems += [
            f"{path} and {p} are tied and have different indices" for p in others if tokens[p] != indices
        ]
    uses = Counter(id(module._parameters.get("weight")) for module in modules.values())
    weights = [modules[path]._parameters.get("weight") for path in targets if path in modules]
    shared = any(weight is not None and uses[id(weight)] > 1 for weight in weights)
    if every_entry and not problems and not tied and not shared:
        problems.append("ensure_weight_tying: nothing that this adapter trains is tied; leave it out")
    return problems


def _meeting(targets: Collection[str], saved: Collection[str], tokens: Collection[str]) -> list[str]:
    """A problem for each module that this adapter would train in two ways."""
    problems = []
    inside = {path: [s for s in saved if f"{path}.".startswith(f"{s}.")] for path in (*targets, *tokens)}
    for path in tokens:
        if path in targets:
            problems.append(f"{path} is in target_modules and in (or tied to) trainable_token_indices")
        if inside[path]:
            problems.append(f"{path} is in modules_to_save and in (or tied to) trainable_token_indices")
    problems += [f"{p} is a target inside {inside[p][0]} of modules_to_save" for p in targets if inside[p]]
    problems += [
        f"{path} of modules_to_save lies inside the target {target}"
        for path in saved
        for target in targets
        if path.startswith(f"{target}.")
    ]
    return problems


def _warn_of_ties(model: nn.Module, saved: Mapping[str, nn.Module]) -> None:
    for path, module in saved.items():
        inside = set(module.modules())
        shared = {id(p): key for key, p in module.named_parameters()}
        for other, user in base_modules(model):
            for key, parameter in user._parameters.items():
                if user not in inside and id(parameter) in shared:
                    warn(
                        f"{path}.{shared[id(parameter)]} is tied to {other}.{key}: the copy that "
                        "modules_to_save trains is not, and cannot be merged; untie the base if it shall be",
                        stacklevel=2,
                    )


def _with_bias(
    model: nn.Module, config: LoraConfig, saved: Collection[str], targets: Collection[str]
) -> dict[str, nn.Module]:
    """The modules whose bias ``config`` trains; a copy of ``modules_to_save`` has its own."""
    found = {}
    for path, module in base_modules(model):
        bias = module._parameters.get("bias")
        inside = any(f"{path}.".startswith(f"{whole}.") for whole in saved)
        wanted = config.bias == "all" or path in targets
        if wanted and bias is not None and bias.is_floating_point() and not inside:
            found[path] = module
    return found


def place_extras(model: nn.Module, extras: Extras, name: str, config: LoraConfig, *, widen: bool) -> None:
    """Put into ``model`` what ``find_extras`` found, after the factors of the adapter ``name``."""
    place_saved(extras.saved, extras.ties, name, config)
    place_tokens(model, extras.tokens, extras.followers, name, widen=widen)
    if extras.biases != "none":
        targets = [path for path, layer in adapter_layers(model) if _is_target(layer, name)]
        owners = _with_bias(model, config, extras.saved, targets)
        hold(model, name, {f"{p}.bias" if p else "bias": cast(Tensor, m.bias) for p, m in owners.items()})


def _is_target(layer: AdapterLayer, name: str) -> bool:
    return isinstance(layer, LoraLayer) and name in layer.adapter_names()


def check_together(model: nn.Module, names: Collection[str]) -> None:
    """Raise ConfigError if ``names`` cannot be active at the same time."""
    problems = []
    for path, layer in adapter_layers(model):
        if clash := layer.clash(names):
            problems.append(f"{path}: {clash}" if path else clash)
    if problems:
        raise ConfigError(bullet_list(f"{list(names)} cannot be active at the same time:", problems))
