"""The parts of a model that sees images, and which of their layers an adapter is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from rankfold.errors import ConfigError, TargetError, bullet_list, nearest
from rankfold.lora import LoraConfig
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.registry import base_modules
from rankfold.lora.placing.targets import find_targets, module_names, shortest_list
from rankfold.models.choices import Part

PARTS: tuple[Part, ...] = get_args(Part)
IN_WORDS = {"language": "language model", "projector": "projector", "vision": "vision tower"}
MERGER = "merger"  # what a projector inside a vision tower is called (Qwen-VL)


@dataclass(frozen=True)
class ModelParts:
    """The dotted names of the modules that make up each part; a model of text alone has one part."""

    language: tuple[str, ...]
    projector: tuple[str, ...] = ()
    vision: tuple[str, ...] = ()

    def part_of(self, name: str) -> Part | None:
        """The part that a module belongs to; None for the head and what holds the parts."""
        if _inside(name, self.projector):  # which may lie in the tower
            return "projector"
        if _inside(name, self.vision):
            return "vision"
        return "language" if _inside(name, self.language) else None


@dataclass(frozen=True)
class Scope:
    """What an adapter trains, in the words of LoraConfig: a list of names, never a pattern, and modules that
    are trained whole.  ``told`` says for each part what of it is trained."""

    target_modules: list[str]
    modules_to_save: list[str]
    told: list[str]

    def options(self) -> dict[str, Any]:
        """The arguments for LoraConfig."""
        saved = {"modules_to_save": self.modules_to_save} if self.modules_to_save else {}
        return {"target_modules": self.target_modules, **saved}


def model_parts(model: Any) -> ModelParts:
    """Find the parts of a transformers model by what it says itself (``get_decoder``, ``get_encoder``).

    The projector is what stands beside tower and language model, or is called a merger inside the tower."""
    names = {id(module): name for name, module in base_modules(model)}
    tower = _tower(model)
    if tower is None or id(tower) not in names:
        return ModelParts(("",))
    language, vision = names[id(model.get_decoder())], names[id(tower)]
    holder = language.rpartition(".")[0]
    beside = [
        f"{holder}.{name}" if holder else name
        for name, child in model.get_submodule(holder).named_children()
        if any(True for _ in child.parameters())
    ]
    heads = {names.get(id(model.get_output_embeddings()))}
    mergers = [f"{vision}.{name}" for name, _ in tower.named_children() if MERGER in name]
    others = [name for name in beside if name not in {language, vision} | heads]
    return ModelParts((language,), (*others, *mergers), (vision,))


def adapter_scope(
    model: Any,
    targets: str | Collection[str] = "all-linear",
    train: Sequence[str] = ("language",),
    whole: Collection[str] = ("projector",),
) -> Scope:
    """The layers that ``targets`` (see LoraConfig) means in the parts that ``train`` names.

    Nothing outside of them is matched by accident: ``["q_proj"]`` is the language model's unless the tower
    is to be trained too.  Parts in ``whole`` are trained as they are, the others by LoRA.

    Raises ConfigError for a part that there is not, TargetError for a name that matches nothing there."""
    parts = model_parts(model)
    _check_parts(train, whole, parts, type(model).__name__)
    saved = [name for part in PARTS if part in train and part in whole for name in getattr(parts, part)]
    adapted = [part for part in PARTS if part in train and part not in whole]
    if not adapted:
        raise ConfigError(f"parts: {', '.join(train)} leaves no part for LoRA; add language, or vision")
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    everywhere = find_targets(model, config)
    found = [name for name in everywhere if parts.part_of(name) in adapted and not _inside(name, saved)]
    entries = [] if isinstance(targets, str) else targets
    unmatched = [entry for entry in entries if not any(is_named(entry, name) for name in found)]
    if unmatched or not found:
        raise TargetError(_nothing_there(unmatched or [str(targets)], adapted, everywhere, parts))
    names = module_names(model)
    short = shortest_list(found, names)
    return Scope(
        target_modules=found if isinstance(short, str) else short,
        modules_to_save=[_short_name(name, names) for name in saved],
        told=[_told(part, parts, found, saved) for part in PARTS if getattr(parts, part)],
    )


def _tower(model: Any) -> nn.Module | None:
    config = getattr(model, "config", None)
    if not hasattr(config, "vision_config") or not hasattr(model, "get_encoder"):
        return None
    tower = model.get_encoder(modality="image")
    return tower if isinstance(tower, nn.Module) and tower is not model else None


def _check_parts(train: Sequence[str], whole: Collection[str], parts: ModelParts, kind: str) -> None:
    problems = [
        f"there is no part {part!r}{nearest(part, PARTS)}; the parts are {', '.join(PARTS)}"
        for part in dict.fromkeys((*train, *whole))
        if part not in PARTS
    ]
    problems += [
        f"a {kind} has no {IN_WORDS[part]}" for part in PARTS if part in train and not getattr(parts, part)
    ]
    if problems or not train:
        raise ConfigError(bullet_list("these parts cannot be trained:", problems or ["none is named"]))


def _nothing_there(
    entries: Sequence[str], adapted: Sequence[Part], everywhere: Sequence[str], parts: ModelParts
) -> str:
    elsewhere = [name for name in everywhere if any(is_named(entry, name) for entry in entries)] or everywhere
    places = {IN_WORDS.get(str(parts.part_of(name)), "head") for name in elsewhere}
    where = " and ".join(IN_WORDS[part] for part in adapted)
    return (
        f"target_modules matched nothing in the {where}: {entries}; "
        f"found in the {' and '.join(sorted(places))}, which must stand under parts to be adapted"
    )


def _told(part: Part, parts: ModelParts, found: Sequence[str], saved: Sequence[str]) -> str:
    """One line: which layers of a part are trained."""
    where = f"{IN_WORDS[part]} ({', '.join(getattr(parts, part)) or 'the model'})"
    if set(getattr(parts, part)) <= set(saved):
        return f"{where}: trained whole"
    kinds = Counter(name.rpartition(".")[2] for name in found if parts.part_of(name) == part)
    if not kinds:
        return f"{where}: frozen"
    return f"{where}: LoRA on {', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}"


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def _short_name(name: str, names: Sequence[str]) -> str:
    """The shortest dotted ending of ``name`` that is no other module's."""
    parts = name.split(".")
    endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next((e for e in endings if sum(is_named(e, other) for other in names) == 1), name)
