"""What an adapter trains beside low-rank factors, found, checked and put in place together: saved modules,
token rows and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast
from warnings import warn

from torch import Tensor, nn

from rankfold.errors import ConfigError, RankfoldWarning, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.overrides import hold
from rankfold.lora.layers.registry import adapter_layers, base_modules
from rankfold.lora.layers.saved import (
    SavedModule,
    find_saved,
    find_ties,
    idle_entries,
    place_saved,
    wrong_saved,
)
from rankfold.lora.layers.tokens import TokenLayer, find_followers, find_tokens, place_tokens, wrong_tokens
from rankfold.lora.placing.ties import says_tied


@dataclass(frozen=True)
class NonLoraParams:
    """What one adapter trains beside its factors, found and checked; ``biases`` only says which."""

    saved: dict[str, nn.Module] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)
    biases: str = "none"


def find_non_lora_params(
    model: nn.Module,
    targets: Collection[str],
    config: LoraConfig,
    taken: Mapping[str, LoraConfig],
    *,
    new: bool = False,
) -> NonLoraParams:
    """What ``config`` trains beside the factors of ``targets``, on a model with the adapters ``taken``.

    Raises TargetError or ConfigError listing all that does not fit, before anything is changed."""
    asked = (config.modules_to_save, config.trainable_token_indices, config.ensure_weight_tying)
    if not taken and not any(asked) and config.bias == "none":
        if new:
            _tell_idle(model, NonLoraParams(), targets, config)
        return NonLoraParams()
    with_bias = [name for name, other in taken.items() if other.bias != "none"]
    if config.bias != "none" and with_bias:
        raise ConfigError(
            "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' "
            f"for all others: {with_bias[0]!r} trains biases already"
        )
    modules = dict(base_modules(model))
    problems = [
        f"{path} is a target, and another adapter trains it as a whole or by rows"
        for path in targets
        if isinstance(modules.get(path), (SavedModule, TokenLayer))
    ]
    saved, tokens = find_saved(model, config), find_tokens(model, config)
    ties = find_ties(model, saved) if config.ensure_weight_tying and says_tied(model) else {}
    saved |= {p: modules[p] for p in dict.fromkeys([*ties.values(), *ties])}
    followers = find_followers(model, tokens) if tokens else {}
    problems += wrong_saved(saved, ties)
    problems += wrong_tokens(model, tokens, followers, config)
    problems += _meeting(targets, saved, {**tokens, **followers})
    if config.ensure_weight_tying:
        problems += _wrong_ties(modules, tokens)
    if problems:
        raise TargetError(bullet_list("this adapter does not fit the model:", problems))
    if new:
        _tell_idle(model, NonLoraParams(saved, ties, tokens, followers, config.bias), targets, config)
    return NonLoraParams(saved, ties, tokens, followers, config.bias)


def _tell_idle(model: nn.Module, found: NonLoraParams, targets: Collection[str], config: LoraConfig) -> None:
    """Warn of what ``config`` says and nothing in the model answers to, and of ties that will not be kept."""
    modules, idle = dict(base_modules(model)), idle_entries(found.saved, config)
    if config.bias != "none" and not _with_bias(model, config, found.saved, targets):
        idle.append(f"bias={config.bias!r} trains biases, and there is none to train")
    every = _users(modules)
    tied = found.ties or found.followers or _is_shared(modules, targets)
    if config.ensure_weight_tying and not (every and says_tied(model)):
        idle.append("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
    elif config.ensure_weight_tying and not tied:
        idle.append("You have requested `ensure_weight_tying`, but no tied modules are added")
    if idle:
        warn(
            bullet_list("a part of this adapter's config has no effect:", idle), RankfoldWarning, stacklevel=6
        )
    if not config.ensure_weight_tying and says_tied(model):
        _warn_of_ties(model, found.saved)
        if shared := [path for path in targets if path in every]:
            warn(
                f"{', '.join(shared[:3])}: the weight is another module's too, which this adapter leaves as "
                "it is, as `ensure_weight_tying` is not set to True: merging will untie them",
                RankfoldWarning,
                stacklevel=6,
            )


def _wrong_ties(modules: Mapping[str, nn.Module], tokens: Mapping[str, list[int]]) -> list[str]:
    """What keeps ``ensure_weight_tying`` from being kept."""
    problems = []
    for path, indices in tokens.items():
        weight = modules[path]._parameters.get("weight")
        others = [p for p in tokens if p != path and modules[p]._parameters.get("weight") is weight]
        problems += [
            f"{path} and {p} are tied and have different indices: cannot ensure weight tying"
            for p in others
            if tokens[p] != indices
        ]
    return problems


def _users(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of the modules whose weight is another module's too."""
    weights = {p: id(w) for p, m in modules.items() if (w := m._parameters.get("weight")) is not None}
    uses = Counter(weights.values())
    return {path for path, weight in weights.items() if uses[weight] > 1}


def _is_shared(modules: Mapping[str, nn.Module], targets: Collection[str]) -> bool:
    """Whether the weight of one of ``targets`` is another module's too."""
    uses = Counter(id(module._parameters.get("weight")) for module in modules.values())
    weights = [modules[path]._parameters.get("weight") for path in targets if path in modules]
    return any(weight is not None and uses[id(weight)] > 1 for weight in weights)


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
                        "modules_to_save trains is not, as `ensure_weight_tying` is not set to True: "
                        "merging will untie them",
                        RankfoldWarning,
                        stacklevel=6,
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


def place_non_lora_params(
    model: nn.Module, others: NonLoraParams, name: str, config: LoraConfig, *, widen: bool
) -> None:
    """Put into ``model`` what ``find_non_lora_params`` found, after the factors of the adapter ``name``."""
    place_saved(others.saved, others.ties, name, config)
    place_tokens(model, others.tokens, others.followers, name, widen=widen)
    if others.biases != "none":
        targets = [path for path, layer in adapter_layers(model) if _is_target(layer, name)]
        owners = _with_bias(model, config, others.saved, targets)
        hold(model, name, {f"{p}.bias" if p else "bias": cast(Tensor, m.bias) for p, m in owners.items()})


def _is_target(layer: AdapterLayer, name: str) -> bool:
    return isinstance(layer, LoraLayer) and name in layer.adapter_names()


def check_together(layers: Iterable[tuple[str, AdapterLayer]], names: Collection[str]) -> None:
    """Raise ConfigError if ``names`` cannot be active at the same time on ``layers``, by their names."""
    problems = []
    for path, layer in layers if len(names) > 1 else ():
        if clash := layer.clash(names):
            problems.append(f"{path}: {clash}" if path else clash)
    if problems:
        raise ConfigError(bullet_list(f"{list(names)} cannot be active at the same time:", problems))
