"""Adapters of InternVL from one layout to the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from rankfold.errors import AdapterError, ModelError, bullet_list
from rankfold.lora import LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.config.patterns import is_named
from rankfold.lora.files.lora_weights import (
    Pair,
    beside_pairs,
    of_rank,
    padded,
    pair_of,
    pair_tensors,
    sorted_out,
)
from rankfold.lora.placing.targets import shortest_list
from rankfold.models.internvl.factors import join_pairs, split_pair
from rankfold.models.internvl.names import Layout
from rankfold.models.internvl.weights import to_native, to_original

LayoutName = Literal["internvl", "hf"]
# Modules that hold others, which may be saved whole; their own tensors are translated one by one.
CONTAINERS = {
    "mlp1": "model.multi_modal_projector",
    "vision_model": "model.vision_tower",
    "language_model.model": "model.language_model",
}
ORIGINAL_MODULES = ("language_model.", "vision_model.", "mlp1")


@dataclass
class Translated:
    """An adapter in its new layout; ``errors`` are those of the matrices that had to be approximated, and
    ``joined`` how many were put together from several, by their new rank."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    errors: dict[str, float] = field(default_factory=dict)
    joined: Counter[int] = field(default_factory=Counter)


def layout_of_adapter(tensors: Collection[str]) -> LayoutName:
    """The layout that an adapter's keys are written in.  Raises AdapterError if they mix both."""
    paths = [key.removeprefix(PREFIX) for key in tensors]
    original = [path for path in paths if path.startswith(ORIGINAL_MODULES)]
    if original and len(original) < len(paths):
        other = next(path for path in paths if not path.startswith(ORIGINAL_MODULES))
        raise AdapterError(f"the adapter mixes both layouts: it has {original[0]} and {other}")
    return "internvl" if original else "hf"


def translate(
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    layout: Layout,
    names: Collection[str],
    common_rank: int | None = None,
) -> Translated:
    """An adapter in the other layout than its own.  ``names`` are all modules of the native model.

    To the native layout it is exact: queries, keys and values share A and take their rows of B.  Back it is
    exact too, by stacking the As where they differ.  With ``common_rank`` all modules have that rank: a stack
    of a higher one is brought down to it by an SVD, and the error told; a lower one is filled with zeros.
    The new config has a plain list of names.

    Raises AdapterError for what has no counterpart."""
    _refuse(config)
    modules = sorted_out(tensors)
    result = Translated({}, config)
    back = layout_of_adapter(tensors) == "hf"
    pairs = {path: pair_of(path, own, config) for path, own in modules.pairs.items()}
    try:
        if back:
            new, saved = _joined(pairs, layout, result, common_rank), to_original(modules.saved, layout)
        else:
            new, saved = _split(pairs, layout), dict(to_native(modules.saved.items(), layout))
    except ModelError as error:
        raise AdapterError(f"the adapter cannot be translated: {error}") from error
    for path, pair in new.items():
        result.tensors |= pair_tensors(path, pair)
    result.tensors |= {f"{PREFIX}{path}": tensor for path, tensor in saved.items()}
    known = [*names] if not back else original_names(names, layout)
    result.config = _config(config, new, known, _saved_modules(config, modules.saved, layout, back))
    return result


def _refuse(config: LoraConfig) -> None:
    if problems := beside_pairs(config):
        raise AdapterError(bullet_list("this adapter cannot be translated:", problems))


def _split(pairs: Mapping[str, Pair], layout: Layout) -> dict[str, Pair]:
    new: dict[str, Pair] = {}
    problems = []
    for path, pair in pairs.items():
        names = layout.native(path)
        if not names:
            problems.append(f"{path} is no module of an InternVL")
        elif len(names) == 1:
            new[names[0]] = pair
        elif len(pair.B) != layout.groups(path).rows:
            problems.append(f"{path} has {len(pair.B):,} rows; the base has {layout.groups(path).rows:,}")
        else:
            new |= zip(names, split_pair(pair, layout.groups(path)), strict=True)
    if problems:
        raise AdapterError(bullet_list("the adapter is not of this base:", problems))
    return new


def _joined(
    pairs: Mapping[str, Pair], layout: Layout, result: Translated, common_rank: int | None
) -> dict[str, Pair]:
    new: dict[str, Pair] = {}
    fused: dict[str, dict[int, Pair]] = {}
    unknown = []
    for path, pair in pairs.items():
        found = layout.original(path)
        if found is None:
            unknown.append(f"{path} is no module of an InternVL")
        elif layout.is_fused(found[0]):
            fused.setdefault(found[0], {})[found[1]] = pair
        else:
            new[found[0]] = pair
    if unknown:
        raise AdapterError(bullet_list("the adapter is not of this base:", unknown))
    for name, parts in fused.items():
        try:
            whole = join_pairs([parts.get(place) for place in range(3)], layout.groups(name))
        except RuntimeError as error:
            raise AdapterError(f"the adapter is not of this base: {name}: {error}") from error
        if common_rank is not None and whole.rank > common_rank:
            whole, result.errors[name] = of_rank(whole, common_rank)
        new[name] = whole
        result.joined[whole.rank] += 1
    return {path: padded(pair, common_rank or 0) for path, pair in new.items()}


def _config(config: LoraConfig, pairs: Mapping[str, Pair], names: list[str], saved: list[str]) -> LoraConfig:
    """``config`` for other modules: each keeps its scale, and the targets are a list of names."""
    alphas = {path: _alpha(pair, config.use_rslora) for path, pair in pairs.items()}
    [(rank, _)] = Counter(pair.rank for pair in pairs.values()).most_common(1) or [(config.r, 0)]
    own = [alphas[path] for path, pair in pairs.items() if pair.rank == rank]
    alpha = Counter(own).most_common(1)[0][0] if own else config.lora_alpha
    targets = shortest_list([*pairs], names)
    return replace(
        config,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={path: pair.rank for path, pair in pairs.items() if pair.rank != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        target_modules=targets if isinstance(targets, list) else [*pairs],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved or None,
        auto_mapping=None,
    )


def _alpha(pair: Pair, rslora: bool) -> float:
    alpha = pair.scale * (math.sqrt(pair.rank) if rslora else pair.rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _saved_modules(config: LoraConfig, saved: Collection[str], layout: Layout, back: bool) -> list[str]:
    """The new names of the modules in ``modules_to_save`` that the file holds."""
    containers = {new: old for old, new in CONTAINERS.items()} if back else CONTAINERS
    entries = config.modules_to_save or ()
    found: list[str] = []
    for path in saved:
        parts = path.split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        owner = next((o for o in owners if any(is_named(e, o) for e in entries)), None)
        if owner in containers:
            found.append(containers[owner])
        elif owner is not None:
            back_to = layout.original(owner) if back else None
            found += [back_to[0]] if back_to else [] if back else layout.native(owner)
    return list(dict.fromkeys(found))


def original_names(names: Collection[str], layout: Layout) -> list[str]:
    """The modules of the original model, from those of the native one."""
    found = (layout.original(name) for name in names)
    return list(dict.fromkeys(name for pair in found if pair is not None for name in [pair[0]]))
