"""Base parameters of which an adapter has values of its own: trained biases, loaded embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.registry import HELD
from rankfold.lora.layers.saved import SavedModule
from rankfold.lora.layers.tokens import TokenLayer


@dataclass
class Held:
    """A base parameter of which one adapter has its own value, and the places where the model uses it."""

    original: nn.Parameter
    own: nn.Parameter
    places: list[tuple[nn.Module, str]]
    paths: list[str]
    trained: bool

    def show(self, parameter: nn.Parameter) -> None:
        """Put ``parameter`` (``original`` or ``own``) where the model looks."""
        for module, key in self.places:
            shown = module._parameters[key]
            assert shown is not None
            if shown is not parameter:
                # The one out of sight misses the model's moves between devices and dtypes.
                parameter.data = parameter.data.to(shown)
                module._parameters[key] = parameter


class HeldParameters(AdapterLayer):
    """Swaps base parameters for an adapter's own while that adapter is active.

    Stands beside the model (in ``vars(model)``, not among its modules) and adds no key to the state
    dict: under a base key stands whichever value is in use.  PEFT instead changes the base for good."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.start()
        self.root = [root]  # in a list, so that torch does not take the model for a part of this
        self.held: dict[str, list[Held]] = {}
        vars(root)[HELD] = self

    def end(self) -> None:
        for name in self.merged_adapters:
            for held in self.held[name]:
                held.original.data.copy_(held.own.data)
        self._show([])
        del vars(self.root[0])[HELD]
        super().end()

    def adapter_names(self) -> Collection[str]:
        return self.held.keys()

    def drop(self, name: str) -> None:
        self._show([])
        del self.held[name]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The trained ones; a loaded embedding is kept, and not trained."""
        trained = [held for held in self.held.get(name, []) if held.trained]
        return {file_path(self.root[0], path): held.own for held in trained for path in held.paths}

    def clash(self, names: Collection[str]) -> str | None:
        owners: dict[int, str] = {}
        for name in names:
            for held in self.held.get(name, []):
                if owners.setdefault(id(held.original), name) != name:
                    other = owners[id(held.original)]
                    return f"{other!r} and {name!r} each bring their own {held.paths[0]}"
        return None

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        broken = [h.paths[0] for n in names for h in self.held[n] if not torch.isfinite(h.own).all()]
        if broken:
            raise MergeError(f"NaN or infinite values in {', '.join(broken)}")
        return {}

    def refresh(self) -> None:
        super().refresh()
        self._show(self.merged_adapters or self.applied)

    def value(self, parameter: nn.Parameter, name: str) -> nn.Parameter:
        """What ``parameter``, as it stands in the model now, is when ``name`` is active."""
        original = own_original(self, parameter)
        return next((h.own for h in self.held.get(name, []) if h.original is original), original)

    def _show(self, names: Iterable[str]) -> None:
        for group in self.held.values():
            for held in group:
                held.show(held.original)
        for name in names:
            for held in self.held[name]:
                held.show(held.own)


def hold(model: nn.Module, name: str, own: Mapping[str, Tensor], *, trained: bool = True) -> None:
    """Give the adapter ``name`` its own values of base parameters: copies of ``own``, by dotted name.

    Names of one shared parameter make one entry."""
    holder = holder_of(model) or HeldParameters(model)
    entries = {id(held.original): held for held in holder.held.setdefault(name, [])}
    for path, value in own.items():
        parent, _, key = path.rpartition(".")
        module = model.get_submodule(parent)
        original = own_original(holder, cast(nn.Parameter, module._parameters[key]))
        if id(original) not in entries:
            copied = nn.Parameter(value.detach().to(original, copy=True), requires_grad=False)
            entries[id(original)] = Held(original, copied, [], [], trained)
            holder.held[name].append(entries[id(original)])
        entries[id(original)].places.append((module, key))
        entries[id(original)].paths.append(path)
    holder.refresh()


def own_original(holder: HeldParameters | None, parameter: nn.Parameter) -> nn.Parameter:
    """The base's own parameter where ``parameter`` may be an adapter's."""
    every = [held for group in holder.held.values() for held in group] if holder else []
    return next((held.original for held in every if parameter is held.own), parameter)


def file_path(model: nn.Module, path: str) -> str:
    """The dotted name of a base parameter in PEFT's file, where an adapted layer is inside a wrapper."""
    module, spelt = model, ""
    for part in path.split("."):
        if isinstance(module, TokenLayer):
            spelt += "token_adapter."
        if isinstance(module, AdapterLayer) and not isinstance(module, SavedModule):
            spelt += "base_layer."
        spelt += f"{part}."
        module = module._modules.get(part) or module
    return spelt.removesuffix(".")


def holder_of(model: nn.Module) -> HeldParameters | None:
    return cast(HeldParameters | None, vars(model).get(HELD))
