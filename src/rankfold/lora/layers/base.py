"""What every adapted layer has in common, and the table of which layer becomes which.

A layer is adapted by changing the object's class to a subclass of its own (as
``torch.nn.utils.parametrize`` does): the object, its weight, its hooks and every other reference to it
stay what they were, its state dict gains keys and renames none, and ``restore`` turns it back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.config.lora_config import LoraConfig

OWN_FORWARDS = {"forward", "_old_forward"}  # the latter is accelerate's
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Under this name a model holds the adapter layer that is none of its modules: ``held.HeldParameters``.
HELD = "_held_parameters"


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter as one layer sees it.  ``target`` is the layer's dotted name; with ``widen`` the
    adapter of a half-precision layer is float32, as in PEFT."""

    name: str
    target: str
    rank: int
    alpha: float
    config: LoraConfig
    widen: bool = True

    @property
    def scale(self) -> float:
        return self.config.scale(self.rank, self.alpha)


class AdapterLayer(nn.Module):
    """A layer that carries named adapters of any kind.

    ``applied`` names the adapters whose effect ``forward`` adds: none while they are disabled or merged.
    A subclass implements ``add_adapter``, ``drop``, ``adapter_names``, ``adapter_tensors`` and, if it can
    be merged, ``merged_values``."""

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    # Attributes that adapting adds to the object; some of them only when they are first needed.
    added: ClassVar[tuple[str, ...]] = (
        *("merged_adapters", "applied"),
        *("_active", "_disabled", "_originals", "_leader"),
    )
    # The dimension of the weight along which the outputs lie; None where DoRA is not supported.
    row_dim: ClassVar[int | None] = None
    # Whether the starts that need the weight as a matrix are supported.
    is_matrix: ClassVar[bool] = False

    merged_adapters: list[str]
    applied: tuple[str, ...]
    _active: list[str]
    _disabled: bool
    _originals: dict[str, Tensor]
    _leader: list[AdapterLayer]  # in a list, so that torch does not take the leader for a part of this layer

    def start(self) -> None:
        """Make room for adapters on a layer that has just become an adapter layer."""
        # Not by assignment: torch's __setattr__ takes longer than all the rest, for each attribute.
        self.__dict__.update(
            merged_adapters=[], applied=(), _active=[], _disabled=False, _originals={}, _leader=[]
        )

    def end(self) -> None:
        """Remove everything that ``start`` and ``add_adapter`` put on the layer."""
        for name in type(self).added:
            self.__dict__.pop(name, None)
            self._modules.pop(name, None)

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        """What keeps ``layer``, plain or adapted, from carrying ``spec``; asked before any is changed."""
        return []

    def add_adapter(self, spec: AdapterSpec) -> None:
        raise NotImplementedError

    def delete_adapter(self, name: str) -> None:
        self.drop(name)
        self.set_adapters([active for active in self._active if active != name])

    def drop(self, name: str) -> None:
        """Forget all that belongs to one adapter."""
        raise NotImplementedError

    def adapter_names(self) -> Collection[str]:
        """The adapters that this layer carries."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter by their key in PEFT's file, relative to the layer."""
        raise NotImplementedError

    def file_depth(self, name: str) -> int:
        """How many wrappers PEFT puts around this layer for one adapter."""
        return int(name in self.adapter_names())

    def clash(self, names: Collection[str]) -> str | None:
        """What is wrong with ``names`` being active at a time, if anything."""
        return None

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        """The base parameters after merging ``names``, which do not clash, by name, in the base's dtype.

        Raises MergeError where that cannot be had."""
        raise MergeError(f"a {self.plain_class.__name__} with this kind of adapter cannot be merged")

    @property
    def leader(self) -> AdapterLayer | None:
        """The layer with which this one shares its weight, whose adapters count here too."""
        return self._leader[0] if self._leader else None

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that merging may change."""
        return self.named_parameters(recurse=False)

    @property
    def base_layer(self) -> nn.Module:
        """This layer: it *is* the base layer; PEFT's wrapper has the base inside."""
        return self

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self._disabled = disabled
        self.refresh()

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def set_adapters(self, names: Collection[str]) -> None:
        """Make ``names`` the active adapters; those not carried here are passed over."""
        self.__dict__["_active"] = list(names)
        self.refresh()

    def refresh(self) -> None:
        """Work out ``applied`` anew; called after every change of state."""
        carried = self.adapter_names()
        idle = self._disabled or self.merged
        self.__dict__["applied"] = () if idle else tuple(name for name in self._active if name in carried)

    @torch.no_grad()
    def merge(self, names: Collection[str], values: Mapping[str, Tensor], *, keep: bool) -> None:
        """Store ``values`` (from ``merged_values``); with ``keep`` the originals stay in memory, so that
        ``unmerge`` gives back the exact bits."""
        for key, value in values.items():
            if keep:
                self._originals[key] = self._parameters[key].detach().clone()  # type: ignore[union-attr]
            self.store(key, value)
        self.merged_adapters = list(names)
        self.refresh()

    @torch.no_grad()
    def unmerge(self) -> None:
        for key, value in self._originals.items():
            self.store(key, value)
        self._originals, self.merged_adapters = {}, []
        self.refresh()

    def store(self, key: str, value: Tensor) -> None:
        """Put a new value into a base parameter."""
        cast(Tensor, self._parameters[key]).copy_(value)


def cast_merged(total: Tensor, like: Tensor) -> Tensor:
    """``total`` in the dtype of ``like``.  Raises MergeError if it is not finite there."""
    merged = total.to(like.dtype)
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"the merged weight is not finite in {like.dtype}: largest magnitude "
            f"{total.abs().max().item():.4g}; merge into a wider dtype or repair the adapter"
        )
    return merged


def upcast(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# Which plain layer becomes which, by class or, for a library that may not be installed, by the class's
# full name.  A subclass of a listed class gets a LoRA class of its own: the effect is added to whatever
# its forward computes.
LORA_CLASSES: dict[type[nn.Module] | str, type[AdapterLayer]] = {}


def register_layer(plain: type[nn.Module] | str, lora: type[AdapterLayer]) -> None:
    """Adapt layers of class ``plain`` (or of that full name) by turning them into ``lora``.

    ``lora`` is a subclass of ``LoraLayer``; it may leave ``plain`` out of its bases.  Of several listed
    classes that a layer belongs to, the nearest counts; a later registration replaces an earlier one."""
    LORA_CLASSES[plain] = lora


def lora_class(kind: type[nn.Module]) -> type[AdapterLayer] | None:
    """The class that a layer of class ``kind`` becomes, or None if there is none."""
    for ancestor in kind.__mro__:
        lora = LORA_CLASSES.get(ancestor) or LORA_CLASSES.get(
            f"{ancestor.__module__}.{ancestor.__qualname__}"
        )
        if lora is not None:
            return mixed_class(lora, kind)
    return None


_mixed_classes: dict[tuple[type, type], type[AdapterLayer]] = {}


def mixed_class(lora: type[AdapterLayer], kind: type[nn.Module]) -> type[AdapterLayer]:
    """``lora`` itself if it was written for ``kind``, else the one subclass of both."""
    if lora.plain_class is kind:
        return lora
    if (lora, kind) not in _mixed_classes:
        prefix = lora.__name__.removesuffix(lora.plain_class.__name__).removesuffix(kind.__name__)
        name = f"{prefix}{kind.__name__}"
        members = {"plain_class": kind, "__module__": __name__}
        _mixed_classes[lora, kind] = cast(type[AdapterLayer], type(name, (lora, kind), members))
    return _mixed_classes[lora, kind]


def adapt(layer: nn.Module, lora: type[AdapterLayer] | None = None) -> AdapterLayer:
    """Turn ``layer`` into its adapter class (or ``lora`` mixed with its own class), in place."""
    if isinstance(layer, AdapterLayer):
        return layer
    kind = type(layer)
    become(layer, mixed_class(lora, kind) if lora is not None else cast(Any, lora_class(kind)))
    adapted = cast(AdapterLayer, layer)
    adapted.start()
    return adapted


def computes_otherwise(layer: nn.Module, plain: type[nn.Module], methods: Collection[str]) -> bool:
    """Whether ``layer`` is of a subclass of ``plain`` that replaces one of ``methods`` and that nobody has
    registered: an update made for ``plain`` may then be no change of its weight."""
    kind = layer.plain_class if isinstance(layer, AdapterLayer) else type(layer)
    replaced = any(getattr(kind, method) is not getattr(plain, method) for method in methods)
    return replaced and kind not in LORA_CLASSES


def restore(layer: AdapterLayer) -> None:
    """Turn an adapter layer back into the plain layer it was made from, in place."""
    layer.end()
    become(layer, layer.plain_class)


def become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of ``layer``, and with it a bound ``forward`` of the old one that the object holds:
    accelerate's hooks keep one, without which the adapter would be passed over in silence."""
    before = type(layer).forward
    object.__setattr__(layer, "__class__", kind)  # past torch's __setattr__, which is slow
    for name in OWN_FORWARDS & layer.__dict__.keys():
        if getattr(layer.__dict__[name], "__func__", None) is before:
            layer.__dict__[name] = MethodType(kind.forward, layer)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what adapters have added: six modules fewer a layer to walk."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        added = type(module).added if isinstance(module, AdapterLayer) else ()
        for name, child in reversed(module._modules.items()):
            if child is not None and name not in added:
                pending.append((f"{path}.{name}" if path else name, child))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapter layer of ``model`` with its dotted name, what stands beside a module before it."""
    for path, module in base_modules(model):
        if HELD in module.__dict__:
            yield path, module.__dict__[HELD]
        if isinstance(module, AdapterLayer):
            yield path, module
