"""What every adapted layer has in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.config.lora_config import LoraConfig

HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter as one layer sees it.  ``target`` is the layer's dotted name; with ``widen`` the
    adapter of a half-precision layer is float32, as in PEFT; ``without_memory`` puts it on the meta
    device."""

    name: str
    target: str
    rank: int
    alpha: float
    config: LoraConfig
    widen: bool = True
    without_memory: bool = False

    @property
    def scale(self) -> float:
        return self.config.scale(self.rank, self.alpha)


class AdapterLayer(nn.Module):
    """A layer that carries named adapters of any kind.  Its calls have PEFT's names.

    ``applied`` names the adapters whose effect ``forward`` adds: the active ones that are not merged, none
    while they are disabled.  A subclass implements ``add_adapter``, ``drop``, ``adapter_names``,
    ``adapter_tensors`` and, if it can be merged, ``merged_values``."""

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    # Attributes that adapting adds to the object; some of them only when they are first needed.
    added: ClassVar[tuple[str, ...]] = (
        *("merged_adapters", "applied"),
        *("_active", "_disabled", "_originals", "_leader"),
    )
    # The attributes that hold something by an adapter's name: those with tensors, and the others.
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    # The dimension of the weight along which the outputs lie; None where DoRA is not supported.
    row_dim: ClassVar[int | None] = None
    # Whether the starts that need the weight as a matrix are supported.
    is_matrix: ClassVar[bool] = False
    # The class that this one was mixed from, and what it was made of (see ``mixed_class``).
    mixed_from: ClassVar[tuple[Any, ...] | None] = None
    quantization_backend: ClassVar[str | None] = None
    # The share of a merged update that the layer's storage has no room for.
    update_missed: float = 0.0

    merged_adapters: list[str]
    applied: tuple[str, ...]
    _active: list[str]
    _disabled: bool
    _originals: dict[str, Tensor]
    _leader: list[AdapterLayer]  # in a list, so that torch does not take the leader for a part of this layer

    def start(self) -> None:
        """Make room for adapters on a layer that has just become an adapter layer."""
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
        self.__dict__["_active"] = [active for active in self._active if active != name]
        self.refresh()

    def drop(self, name: str) -> None:
        """Forget all that belongs to one adapter."""
        raise NotImplementedError

    def adapter_names(self) -> Collection[str]:
        """The adapters that this layer carries."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter by their key in PEFT's file, relative to the layer."""
        raise NotImplementedError

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names())

    def file_depth(self, name: str) -> int:
        """How many wrappers PEFT puts around this layer for one adapter."""
        return int(name in self.adapter_names())

    def clash(self, names: Collection[str]) -> str | None:
        """What is wrong with ``names`` being active at a time, if anything."""
        return None

    def cannot_stay_apart(self, merged: Collection[str]) -> str | None:
        """What keeps the other active adapters from being added once ``merged`` are merged, if anything."""
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
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self.__dict__["_active"] = [names] if isinstance(names, str) else list(names)
        self.refresh()

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters count, trained as ``set_adapter`` says, or none; what is merged is taken
        out then."""
        if not enabled and self.merged:
            self.unmerge()
        self.__dict__["_disabled"] = not enabled
        if enabled:
            self.set_adapter(list(self._active))
        else:
            self.set_requires_grad(list(self.adapter_names()), False)
            self.refresh()

    def set_adapter(self, adapter_names: str | Collection[str], inference_mode: bool = False) -> None:
        """Make ``adapter_names`` the active adapters, the only ones that are trained, and these not with
        ``inference_mode``; names that are not carried here are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.__dict__["_active"] = names
        for name in self.adapter_names():
            self.set_requires_grad(name, name in names and not inference_mode)
        self.refresh()

    def activate(self, names: list[str]) -> None:
        """Let ``names`` count here, whatever is trained."""
        self.__dict__["_active"] = names
        self.refresh()

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        """Train, or do not train, the tensors of the named adapters; buffers of a copied module never."""
        carried = self.adapter_names()
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in [name for name in names if name in carried]:
            for tensor in self.adapter_tensors(name).values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.requires_grad_(requires_grad)

    def refresh(self) -> None:
        """Work out ``applied`` anew; called after every change of state."""
        carried, merged = self.adapter_names(), self.merged_adapters
        counts = () if self._disabled else self._active
        self.__dict__["applied"] = tuple(name for name in counts if name in carried and name not in merged)

    def merge(self, safe_merge: bool = False, adapter_names: Collection[str] | None = None) -> None:
        """Merge the named (or the active) adapters of this layer, beside what is merged already; the
        originals stay in memory, and ``unmerge`` gives back the exact bits.

        Every merge is checked (``safe_merge`` is PEFT's word).  Raises MergeError, with nothing changed."""
        wanted = self._active if adapter_names is None else adapter_names
        new = [n for n in wanted if n in self.adapter_names() and n not in self.merged_adapters]
        if new and self.leader is None:
            self.remerge([*self.merged_adapters, *new])

    def remerge(self, names: list[str], *, keep: bool = True, shared: Collection[int] = ()) -> None:
        """Let ``names`` be what is merged here, with the words of ``store_merged``.

        Raises MergeError; the layer is then as it was."""
        before = self.merged_adapters
        self.unmerge()
        try:
            values = {} if self.leader is not None else self.merged_values(names)
        except MergeError:
            if before:
                self.store_merged(before, self.merged_values(before), keep=True)
            raise
        self.store_merged(names, values, keep=keep, shared=shared)

    @torch.no_grad()
    def store_merged(
        self,
        names: Collection[str],
        values: Mapping[str, Tensor],
        *,
        keep: bool,
        shared: Collection[int] = (),
    ) -> None:
        """Store ``values`` (from ``merged_values``); with ``keep`` the originals stay in memory.

        A parameter whose id is in ``shared`` is another module's too, which keeps it as it is."""
        for key, value in values.items():
            home, leaf = self.home(key)
            place = home[leaf]
            if id(place) in shared:
                home[leaf] = nn.Parameter(place.detach().clone(), requires_grad=place.requires_grad)
            if keep:
                self._originals[key] = place if id(place) in shared else place.detach().clone()
            self.store(key, value)
        self.merged_adapters = list(names)
        self.refresh()

    @torch.no_grad()
    def unmerge(self) -> None:
        for key, value in self._originals.items():
            home, leaf = self.home(key)
            if isinstance(value, nn.Parameter):
                home[leaf] = value
            else:
                self.store(key, value)
        self._originals, self.merged_adapters = {}, []
        self.refresh()

    def home(self, key: str) -> tuple[dict[str, Any], str]:
        """The dictionary that holds a base parameter or buffer, and its name there."""
        path, _, leaf = key.rpartition(".")
        owner = self.get_submodule(path)
        return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf

    def store(self, key: str, value: Tensor) -> None:
        """Put a new value into a base parameter."""
        home, leaf = self.home(key)
        cast(Tensor, home[leaf]).copy_(value)

    @classmethod
    def mixing(cls, kind: type[nn.Module]) -> tuple[Any, ...]:
        """A function and its arguments that give the class of this one mixed with ``kind``."""
        return mixed_class, cls, kind

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copying and pickling, also of the classes that are mixed while a program runs."""
        if self.mixed_from is None:
            return super().__reduce_ex__(protocol)
        return remade, self.mixed_from, self.__getstate__()  # type: ignore[no-untyped-call]


class AuxiliaryLayer(AdapterLayer):
    """A layer of which an adapter trains more than low-rank factors: the whole of it, or rows of its
    weight."""

    @property
    def _adapters(self) -> list[str]:
        return list(self.adapter_names())

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self._active if name in self.adapter_names()]


def remade(mixer: Any, *parts: Any) -> AdapterLayer:
    """An empty object of a class that was mixed while a program ran."""
    kind = mixer(*parts)
    return cast(AdapterLayer, kind.__new__(kind))


def cast_merged(total: Tensor, like: Tensor, names: Collection[str]) -> Tensor:
    """``total``, with the adapters ``names`` in it, in the dtype of ``like``.

    Raises MergeError if it is not finite there."""
    merged = total.to(like.dtype)
    if not like.is_meta and not torch.isfinite(merged).all():
        raise MergeError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: the "
            f"largest magnitude is {total.abs().max().item():.4g} in {like.dtype}; merge into a wider dtype "
            "or repair the adapter"
        )
    return merged


def upcast(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_mixed_classes: dict[tuple[type, type], type[AdapterLayer]] = {}


def mixed_class(lora: type[AdapterLayer], kind: type[nn.Module]) -> type[AdapterLayer]:
    """``lora`` itself if it was written for ``kind``, else the one subclass of both."""
    if lora.plain_class is kind:
        return lora
    if (lora, kind) not in _mixed_classes:
        prefix = lora.__name__.removesuffix(lora.plain_class.__name__).removesuffix(kind.__name__)
        name = f"{prefix}{kind.__name__}"
        members = {"plain_class": kind, "__module__": __name__, "mixed_from": lora.mixing(kind)}
        _mixed_classes[lora, kind] = cast(type[AdapterLayer], type(name, (lora, kind), members))
    return _mixed_classes[lora, kind]
