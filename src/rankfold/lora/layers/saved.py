"""``modules_to_save``: whole modules of which each adapter trains and saves a copy of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.config.lora_config import LoraConfig, TaskType
from rankfold.lora.config.patterns import is_named
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec, AuxiliaryLayer
from rankfold.lora.layers.registry import adapt, base_modules, restore
from rankfold.storage.layers import held_layers

# PEFT 0.21.2, peft_model.py: the heads that these tasks train whole.
TASK_MODULES: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class SavedModule(AuxiliaryLayer):
    """A module of any class whose active adapter puts a trained copy in its place.

    Adds ``modules_to_save.<adapter>.<key>`` to the state dict for each of the module's own keys, which
    keep their names and values.  Reading an attribute such as ``weight`` gives the base's, not the
    copy's as in PEFT.  The module's hooks run once, around whichever of the two is called."""

    added: ClassVar[tuple[str, ...]] = ("modules_to_save", *AdapterLayer.added)

    modules_to_save: nn.ModuleDict

    def start(self) -> None:
        super().start()
        self.modules_to_save = nn.ModuleDict()

    @property
    def original_module(self) -> nn.Module:
        """This module: it *is* the base's; PEFT's wrapper has it inside."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.applied:
            return self.modules_to_save[self.applied[0]](*args, **kwargs)
        return super().forward(*args, **kwargs)

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Add a copy of the base module, in the base's dtype as in PEFT.

        A layer with a ``leader`` gets its copy's weight from the leader's; in files it stands twice."""
        self.modules_to_save[spec.name] = plain_copy(self)

    def adapter_names(self) -> Collection[str]:
        return self.modules_to_save.keys()

    def drop(self, name: str) -> None:
        del self.modules_to_save[name]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The copy's parameters, and its buffers, under the names that the base's own have."""
        if name not in self.modules_to_save:
            return {}
        return cast(dict[str, nn.Parameter], own_tensors(self.modules_to_save[name]))

    def clash(self, names: Collection[str]) -> str | None:
        mine = [name for name in names if name in self.modules_to_save]
        text = f"each of {mine} has its own copy of it (modules_to_save)"
        return f"Only one adapter can be set at a time for ModulesToSaveWrapper: {text}" if mine[1:] else None

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        values = own_tensors(self.modules_to_save[next(iter(names))])
        broken = [key for key, value in values.items() if not torch.isfinite(value).all()]
        if broken:
            raise MergeError(f"the trained copy holds NaN or infinite values: {', '.join(broken)}")
        return values

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in self.named_parameters() if not pair[0].startswith("modules_to_save."))


class SavedSequential(SavedModule, nn.Sequential):
    """A ``SavedModule`` that calls its parts one after another: the copies are none of them.

    As in PEFT, it can be called with its adapters disabled or merged.  Counting, iterating and indexing give
    the base's parts."""

    plain_class = nn.Sequential

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._parts().values())

    def __len__(self) -> int:
        return len(self._parts())

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return nn.Sequential(OrderedDict(list(self._parts().items())[place]))
        return list(self._parts().values())[place]

    def _parts(self) -> dict[str, nn.Module]:
        """The base's children by name."""
        return {
            name: part for name, part in self._modules.items() if part is not None and name not in self.added
        }


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``module``'s state dict, not detached."""
    return {key: t for key, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def plain_copy(layer: SavedModule) -> nn.Module:
    """A deep copy of the base module as it is unmerged, without copies and without hooks of its own."""
    # What is in the memo is taken to be copied: hooks may reach far beyond the module.
    memo: dict[int, Any] = {
        id(value): OrderedDict()
        for name, value in vars(layer).items()
        if name.startswith(("_forward", "_backward")) and isinstance(value, OrderedDict)
    }
    memo[id(layer.modules_to_save)] = nn.ModuleDict()
    memo[id(layer._leader)] = []
    twin = copy.deepcopy(layer, memo)
    if twin.merged:
        twin.unmerge()
    restore(twin)
    return twin


def with_task_modules(config: LoraConfig) -> LoraConfig:
    """``config`` with the heads in ``modules_to_save`` that its task trains whole, as in PEFT."""
    given = config.modules_to_save or []
    missing = [name for name in TASK_MODULES.get(str(config.task_type), ()) if name not in given]
    return config.replaced(modules_to_save=[*given, *missing]) if missing else config


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` means, by dotted name, the outermost where they are nested.

    An entry is a module's dotted name or its dotted ending."""
    entries = set(config.modules_to_save or ())
    found: dict[str, nn.Module] = {}
    for path, module in base_modules(model) if entries else ():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and any(is_named(entry, path) for entry in entries):
            found[path] = module
    return found


def find_ties(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """The modules that share their weight with one in ``found``, in that or not, each with the name of the
    first module of the model that has this weight."""
    shared = {id(w) for module in found.values() if (w := module._parameters.get("weight")) is not None}
    first: dict[int, str] = {}
    ties = {}
    for path, module in base_modules(model):
        weight = id(module._parameters.get("weight"))
        if weight in shared and first.setdefault(weight, path) != path:
            ties[path] = first[weight]
    return ties


def idle_entries(found: Collection[str], config: LoraConfig) -> list[str]:
    """A text for each entry of ``modules_to_save`` that no module answers to; heads of the task may lack."""
    optional = TASK_MODULES.get(str(config.task_type), ())
    return [
        f"modules_to_save names {entry!r}, and no module is called that"
        for entry in dict.fromkeys(config.modules_to_save or ())
        if entry not in optional and not any(is_named(entry, path) for path in found)
    ]


def wrong_saved(found: Mapping[str, nn.Module], ties: Mapping[str, str]) -> list[str]:
    """A problem for each module that cannot be trained whole."""
    problems = []
    for path, module in found.items():
        kind = type(module).__name__
        if isinstance(module, CONTAINERS):
            problems.append(f"modules_to_save: {path} is a {kind}, which is never called")
        elif not any(p.is_floating_point() for p in module.parameters()):
            problems.append(f"modules_to_save: {path} ({kind}) has no floating-point parameter to train")
        elif held_layers(module):
            problems.append(
                f"modules_to_save: {path} ({kind}) holds weights in few bytes, which are not trained; "
                "dequantise(model) first"
            )
        others = [
            f"{path}.{inner}".rstrip(".") for inner, layer in base_modules(module) if _is_other(layer, module)
        ]
        problems += [f"modules_to_save: {where} carries another kind of adapter already" for where in others]
        if isinstance(module, SavedModule) and (module.leader is not None) != (path in ties):
            problems.append(f"modules_to_save: {path} is tied for one adapter and not for another")
    return problems


def _is_other(layer: nn.Module, module: nn.Module) -> bool:
    """Whether ``layer``, a part of ``module``, has an adapter that is no copy of ``module``."""
    return isinstance(layer, AdapterLayer) and not (isinstance(layer, SavedModule) and layer is module)


def place_saved(found: dict[str, nn.Module], ties: Mapping[str, str], name: str, config: LoraConfig) -> None:
    """Give each module a copy for the adapter ``name``; copies of ``ties`` have one weight."""
    for path, module in found.items():
        kind = SavedSequential if isinstance(module, nn.Sequential) else SavedModule
        adapt(module, kind).add_adapter(AdapterSpec(name, path, config.r, config.lora_alpha, config))
    for path, leader in ties.items():
        follower, owner = cast(SavedModule, found[path]), cast(SavedModule, found[leader])
        follower._leader = [owner]
        weight = owner.modules_to_save[name]._parameters["weight"]
        follower.modules_to_save[name].register_parameter("weight", weight)
