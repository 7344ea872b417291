"""Adapters from before transformers 5, in which each expert of a mixture was a few linear layers.

Now all experts of a layer are two parameters: of Mixtral, ``w1`` and ``w3`` stand one below the other in
``gate_up_proj``, and ``w2`` is ``down_proj``.  The pairs of the experts become pairs of these: an expert's
update of gate_up_proj is that of w1 above that of w3, s [B1 0; 0 B3] [A1; A3], exactly, of twice the rank."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rankfold.compat import conversions, renames_one_by_one
from rankfold.errors import AdapterError, bullet_list
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.registry import lora_class
from rankfold.lora.placing.targets import alpha_of, module_names, rank_of, shortest_list

EXPERT_KEY = re.compile(rf"{re.escape(PREFIX)}(.+\.experts)\.(\d+)\.(\w+)\.(.+)")
PAIR = ("lora_A.weight", "lora_B.weight")
# transformers' operations that put one expert's weight below another's, and nothing else.
STACKING = ("MergeModulelist", "Concatenate")


@dataclass
class OldExperts:
    """The factors of one mixture: ``tensors[layer, expert, key]``, under the name it had, and has now."""

    before: str
    owner: str
    tensors: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> set[str]:
        return {layer for layer, _, _ in self.tensors}


def with_fused_experts(
    config: LoraConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """``config`` and a file's ``tensors`` as they are for a model with fused experts; unchanged where the
    file names no single experts, or the model has them.

    Raises AdapterError listing why they cannot be fused exactly."""
    found = _fused(config, tensors, model)
    if found is None:
        return config, dict(tensors)
    rest, parameters, patterns = found
    return _fused_config(config, model, rest, parameters, patterns), rest


def _fused(
    config: LoraConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], list[str], dict[str, tuple[int, float]]] | None:
    """The tensors, the fused parameters, and rank and alpha of each by name; None without old experts."""
    mixtures, rest = _old_experts(tensors, model)
    if not mixtures:
        return None
    sources, problems = _fusions(model), []
    patterns: dict[str, tuple[int, float]] = {}
    parameters: list[str] = []
    for mixture in mixtures:
        made = {name: layers for name, layers in sources.items() if mixture.layers & {*layers}}
        unknown = mixture.layers - {layer for layers in made.values() for layer in layers}
        wrong = [f"{mixture.before}.*.{layer} is no layer that was fused" for layer in sorted(unknown)]
        for name, layers in made.items():
            wrong += _wrong(mixture, name, layers, config, model)
        problems += wrong
        for depth, (name, layers) in enumerate(reversed(made.items() if not wrong else ())):
            setting = _setting(mixture, layers, config)
            if patterns.setdefault(name, setting) != setting:
                problems.append(f"{mixture.before}: its rank or alpha is not that of the other mixtures")
            parameters.append(f"{mixture.owner}.{name}")
            place = f"{PREFIX}{mixture.owner}.{'base_layer.' * depth}"
            rest |= {f"{place}{k}": t for k, t in zip(PAIR, _stacked(mixture, layers), strict=True)}
    if problems:
        headline = "the file's single experts cannot be made into this model's fused ones exactly:"
        raise AdapterError(bullet_list(headline, problems[:20]))
    return rest, parameters, patterns


def fused_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``tensors`` as they are for a model with fused experts, for an adapter in place with ``config``,
    which has the scale.  Raises AdapterError as ``with_fused_experts``."""
    names = [key for key in tensors if key.endswith(PAIR[0]) and EXPERT_KEY.fullmatch(key)]
    if not names:
        return dict(tensors)
    rank = min(tensors[key].shape[0] for key in names)
    plain = replace(config, r=rank, rank_pattern={}, alpha_pattern={})
    found = _fused(plain, tensors, model)
    return dict(tensors) if found is None else found[0]


def _old_experts(
    tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[list[OldExperts], dict[str, Tensor]]:
    """What ``tensors`` hold of single experts where ``model`` has fused ones, and the rest of them."""
    found: dict[str, OldExperts] = {}
    rest = {}
    modules = dict(model.named_modules())
    follow = None
    for key, tensor in tensors.items():
        match = EXPERT_KEY.fullmatch(key)
        if match is None or f"{match[1]}.{match[2]}" in modules:
            rest[key] = tensor
            continue
        if match[1] not in found:
            follow = follow or renames_one_by_one(model)
            found[match[1]] = OldExperts(match[1], follow(f"{match[1]}.").removesuffix("."))
        if found[match[1]].owner not in modules:
            rest[key] = tensor
            continue
        found[match[1]].tensors[match[3], int(match[2]), match[4]] = tensor
    return [mixture for mixture in found.values() if mixture.tensors], rest


def _fusions(model: nn.Module) -> dict[str, list[str]]:
    """For each fused parameter of ``model`` the layers it was made of, in their order, by transformers."""
    found = {}
    for step in conversions(model):
        kinds = [type(operation).__name__ for operation in getattr(step, "operations", None) or ()]
        if kinds and kinds == list(STACKING[: len(kinds)]) and len(step.target_patterns) == 1:
            parts = [pattern.rstrip("$").removesuffix(".weight") for pattern in step.source_patterns]
            if all(".experts.*." in f".{part}" for part in parts):
                found[step.target_patterns[0].rpartition(".")[2]] = [p.rpartition(".")[2] for p in parts]
    return found


def _wrong(
    mixture: OldExperts, parameter: str, layers: list[str], config: LoraConfig, model: nn.Module
) -> list[str]:
    """What keeps the experts' pairs for ``layers`` from becoming one for ``parameter``."""
    owner = model.get_submodule(mixture.owner)
    weight = owner._parameters.get(parameter)
    if weight is None or getattr(owner, "is_transposed", False):
        return [f"{mixture.owner} has no {parameter} that holds its experts as (experts, out, in)"]
    named = [(layer, expert) for layer in layers for expert in range(weight.shape[0])]
    lacking = [
        f"{mixture.before}.{expert}.{layer}.{key} is not in the file"
        for layer, expert in named
        for key in PAIR
        if (layer, expert, key) not in mixture.tensors
    ]
    extra = [
        f"{mixture.before}.{expert}.{layer}.{key} has no place in fused experts"
        for layer, expert, key in mixture.tensors
        if layer in layers and (key not in PAIR or expert >= weight.shape[0])
    ]
    if lacking or extra:
        return [*lacking, *extra]
    old = {(rank_of(n, config), alpha_of(n, config)) for n in (f"{mixture.before}.{e}.{k}" for k, e in named)}
    rows = {mixture.tensors[k, e, PAIR[0]].shape[0] for k, e in named}
    if len(old) > 1 or rows != {rank for rank, _ in old}:
        return [f"{mixture.before}: the experts' {', '.join(layers)} differ in rank or alpha"]
    height = weight.shape[1] // len(layers)
    shapes = {
        (mixture.tensors[k, e, PAIR[0]].shape[1], mixture.tensors[k, e, PAIR[1]].shape[0]) for k, e in named
    }
    if shapes != {(weight.shape[2], height)}:
        return [f"{mixture.before}: factors of (in, out) {sorted(shapes)}, not {(weight.shape[2], height)}"]
    return []


def _stacked(mixture: OldExperts, layers: list[str]) -> tuple[Tensor, Tensor]:
    """A (experts * rank, in), expert by expert, and B (out, rank * experts), rank by rank, as in PEFT."""
    experts = sorted({expert for layer, expert, _ in mixture.tensors if layer in layers})
    lora_a, lora_b = [], []
    for expert in experts:
        lora_a += [mixture.tensors[layer, expert, PAIR[0]] for layer in layers]
        lora_b.append(torch.block_diag(*(mixture.tensors[layer, expert, PAIR[1]] for layer in layers)))
    return torch.cat(lora_a), torch.stack(lora_b, dim=-1).flatten(1)


def _setting(mixture: OldExperts, layers: list[str], config: LoraConfig) -> tuple[int, float]:
    """The rank and the alpha of the fused pair, whose scale is that of the single ones."""
    name, count = f"{mixture.before}.0.{layers[0]}", len(layers)
    factor = math.sqrt(count) if config.use_rslora else count
    return count * rank_of(name, config), factor * alpha_of(name, config)


def _fused_config(
    config: LoraConfig,
    model: nn.Module,
    rest: Mapping[str, Tensor],
    parameters: list[str],
    patterns: Mapping[str, tuple[int, float]],
) -> LoraConfig:
    """``config`` for the fused ``parameters`` and for the modules that ``rest`` has factors of."""
    modules = dict(model.named_modules())
    paths = dict.fromkeys(k.removeprefix(PREFIX).partition(".lora_")[0] for k in rest if ".lora_" in k)
    kept = [path for path in paths if path in modules and lora_class(type(modules[path])) is not None]
    # A router was a linear layer; now it is a module of its own class with a weight.
    routers = [
        path
        for path in paths
        if path not in kept and "weight" in vars(modules.get(path, model))["_parameters"]
    ]
    settings = {name.rpartition(".")[2]: patterns[name.rpartition(".")[2]] for name in parameters}
    settings |= {f"{p.rpartition('.')[2]}.weight": (rank_of(p, config), alpha_of(p, config)) for p in routers}
    ranks = {rf".*\.{re.escape(k)}": rank for k, (rank, _) in settings.items() if rank != config.r}
    alphas = {
        rf".*\.{re.escape(k)}": alpha for k, (_, alpha) in settings.items() if alpha != config.lora_alpha
    }
    wanted = config.target_modules
    return replace(
        config,
        target_modules=_modules(wanted, kept, model) if wanted is not None else sorted(kept),
        target_parameters=sorted({*(config.target_parameters or ()), *settings}),
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
    )


def _modules(wanted: list[str] | set[str] | str, kept: list[str], model: nn.Module) -> list[str] | str:
    """``target_modules`` that mean ``kept`` and nothing else."""
    names = module_names(model)
    if isinstance(wanted, str):
        return shortest_list(kept, names) if kept else []
    entries: list[str] = []
    for entry in sorted(wanted):
        meant = [name for name in names if is_named(entry, name)]
        chosen = [name for name in meant if name in kept]
        entries += [entry] if meant and chosen == meant else chosen
    return entries
