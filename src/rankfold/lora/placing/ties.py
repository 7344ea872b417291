"""``ensure_weight_tying`` of targets: an output head that shares its weight with the input embedding shares
the embedding's factors too, transposed, so that the two can be merged into the one weight they have.

In PEFT the head's factors are parameters of their own around the same memory, each trained by its own
gradient.  Here there is one pair, trained by the sum of both."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.errors import AdapterError, TargetError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec
from rankfold.lora.layers.embedding import LoraEmbedding
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.linear import LoraLinear
from rankfold.lora.layers.registry import adapt, adapter_layers, base_modules
from rankfold.lora.placing.targets import alpha_of, rank_of

FACTOR_KEYS = ("lora_A.weight", "lora_B.weight")


class TiedFactor(nn.Module):
    """One of the leader's factors as a follower shows it; no parameter of its own."""

    def __init__(self, layer: LoraLayer, name: str, side: int) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, name=name, side=side)

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.__dict__["layer"].factors(self.__dict__["name"])[self.__dict__["side"]]
        return found


class TiedHead(LoraLinear):
    """An output head without factors of its own: it computes with those of ``leader``, transposed.

    Adds nothing to the state dict; in files its factors stand beside the embedding's, as in PEFT."""

    plain_class = nn.Linear

    def follow(self, spec: AdapterSpec, leader: LoraEmbedding) -> None:
        """Let the adapter of ``leader`` that ``spec`` names count here too."""
        self._leader = [leader]
        self.list_adapter(spec)
        for side, held in enumerate((self.lora_A, self.lora_B)):
            held[spec.name] = TiedFactor(self, spec.name, side)

    def factors(self, name: str) -> tuple[Any, Any]:
        """A (rank, in) and B (out, rank): views of the embedding's B (in, rank) and A (rank, out)."""
        embedding_a, embedding_b = cast(LoraEmbedding, self.leader).factors(name)
        return embedding_b.T, embedding_a.T

    def adapter_tensors(self, name: str) -> dict[str, Any]:
        if name not in self.r:
            return {}
        return {key: factor.detach() for key, factor in zip(FACTOR_KEYS, self.factors(name), strict=True)}

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return {}  # the leader's merged weight is this layer's too


class TiedEmbedding(LoraEmbedding):
    """An embedding without factors of its own: it computes with those of ``leader``, another embedding."""

    plain_class = nn.Embedding

    def follow(self, spec: AdapterSpec, leader: LoraEmbedding) -> None:
        self._leader = [leader]
        self.list_adapter(spec)

    def factors(self, name: str) -> tuple[Any, Any]:
        return cast(LoraEmbedding, self.leader).factors(name)

    def adapter_tensors(self, name: str) -> dict[str, Any]:
        return {key: factor.detach() for key, factor in super().adapter_tensors(name).items()}

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return {}


FOLLOWERS = (TiedHead, TiedEmbedding)


def find_heads(model: nn.Module, targets: Collection[str], config: LoraConfig) -> dict[str, str]:
    """The heads whose weight is that of an embedding, one of the two in ``targets``, each with the
    embedding's name; none unless ``config.ensure_weight_tying``.

    Raises TargetError listing every tie that cannot be kept."""
    modules = dict(base_modules(model))
    users_of = _users_of_weights(modules) if says_tied(model) else {}
    heads: dict[str, str] = {}
    problems = []
    for target in targets:
        users = users_of.get(id(modules[target]._parameters.get("weight")), [])
        if len(users) <= 1:
            continue
        if config.ensure_weight_tying:
            heads |= dict.fromkeys([path for path in users if path != users[0]], users[0])
        elif any(isinstance(modules[path], FOLLOWERS) for path in users):
            problems.append(f"{target} is tied for one adapter and not for another (ensure_weight_tying)")
    for head, embedding in heads.items():
        problems += _wrong_tie(modules, head, embedding, config)
    if problems:
        raise TargetError(bullet_list("these targets cannot be adapted together:", problems))
    return heads


def says_tied(model: nn.Module) -> bool:
    """Whether equal weights are meant to be one: a config may say that they only happen to be."""
    return getattr(getattr(model, "config", None), "tie_word_embeddings", True) is not False


def _users_of_weights(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """The paths of the modules that hold each weight, by the weight's id."""
    users: dict[int, list[str]] = {}
    for path, module in modules.items():
        if (weight := module._parameters.get("weight")) is not None:
            users.setdefault(id(weight), []).append(path)
    return users


def _wrong_tie(modules: Mapping[str, nn.Module], head: str, embedding: str, config: LoraConfig) -> list[str]:
    problems = []
    leader, follower = modules[embedding], modules[head]
    fits = type(follower) in (nn.Linear, nn.Embedding, *FOLLOWERS)
    if not isinstance(leader, nn.Embedding) or not fits:
        problems.append(
            f"{embedding} and {head} are tied: factors of an embedding and of linear heads can be, and not "
            f"those of a {_plain(leader)} and a {_plain(follower)}"
        )
    if config.use_dora:
        problems.append(f"{embedding} and {head} are tied, and DoRA would give each another weight")
    if getattr(leader, "max_norm", None) is not None:
        problems.append(f"{embedding} has max_norm, which the tied {head} has not")
    if any(of(head, config) != of(embedding, config) for of in (rank_of, alpha_of)):
        problems.append(f"{embedding} and {head} are tied and have different ranks or alphas by the patterns")
    if isinstance(leader, LoraEmbedding):
        carried = follower.r if isinstance(follower, FOLLOWERS) else ()
        problems += [
            f"{head} is tied for one adapter and not for {n!r}" for n in leader.r if n not in carried
        ]
    return problems


def _plain(layer: nn.Module) -> str:
    return (layer.plain_class if isinstance(layer, AdapterLayer) else type(layer)).__name__


def with_leaders(targets: Collection[str], heads: Mapping[str, str]) -> list[str]:
    """``targets`` with each head replaced by its embedding, and no name twice."""
    return list(dict.fromkeys(heads.get(target, target) for target in targets))


def spelt_with_leaders(wanted: Collection[str] | str, heads: Mapping[str, str]) -> list[str] | str:
    """``target_modules`` for which PEFT finds the embeddings and not the heads; of a pattern the embeddings
    too, as PEFT writes it."""
    leaders = dict.fromkeys(heads.values())
    if isinstance(wanted, str):
        names = "".join(rf"|^{re.escape(leader)}$" for leader in leaders)
        return f"(?:{wanted}{names})"
    kept = [entry for entry in wanted if not any(is_named(entry, head) for head in heads)]
    missing = [leader for leader in leaders if not any(is_named(entry, leader) for entry in kept)]
    return sorted([*kept, *missing])


def place_heads(model: nn.Module, heads: Mapping[str, str], config: LoraConfig, name: str) -> None:
    """Let the adapter ``name`` of each embedding count in its head."""
    for head, embedding in heads.items():
        module = model.get_submodule(head)
        layer = cast(Any, adapt(module, TiedEmbedding if isinstance(module, nn.Embedding) else TiedHead))
        leader = cast(LoraEmbedding, model.get_submodule(embedding))
        layer.follow(AdapterSpec(name, head, rank_of(head, config), alpha_of(head, config), config), leader)


def check_agreement(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if a file has other factors for a head than for its embedding."""
    layers = dict(adapter_layers(model))
    for path, layer in layers.items():
        if not isinstance(layer, TiedHead) or name not in layer.r:
            continue
        leader = next(p for p, other in layers.items() if other is layer.leader)
        own = [tensors.get(f"{PREFIX}{path}.{key}") for key in FACTOR_KEYS]
        other = [tensors.get(f"{PREFIX}{leader}.lora_embedding_{side}") for side in "BA"]
        for head, embedding in zip(own, other, strict=True):
            if head is not None and embedding is not None and not torch.equal(head, embedding.T):
                raise AdapterError(f"the file has different factors for {leader} and {path}, which are tied")
