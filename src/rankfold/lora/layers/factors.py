"""``LoraLayer``: an adapter layer whose adapters are pairs of low-rank factors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.config.lora_config import changes_base
from rankfold.lora.layers.base import HALF_DTYPES, AdapterLayer, AdapterSpec, cast_merged, upcast
from rankfold.lora.layers.dora import MAGNITUDES, magnitude_tensors, rescaled_weight, start_magnitude
from rankfold.lora.layers.init import (
    Split,
    draw_kaiming,
    drop_spare,
    end_split,
    place_base,
    split_base,
    start_factors,
)

Module = TypeVar("Module", bound=nn.Module)

NO_ADAPTERS = nn.ModuleDict()
NO_DROPOUT = nn.Identity()  # one for all layers: it holds nothing


def never_called(module: nn.Module, inputs: Any) -> None:
    pass


# The fast path of nn.TransformerEncoderLayer reads the weights and passes an adapter by, except where a
# module inside has a hook.  A ModuleDict is never called, so this one costs nothing.
NO_FAST_PATH = OrderedDict({0: never_called})


class LoraLayer(AdapterLayer):
    """Adds ``lora_A.<adapter>.weight`` and ``lora_B.<adapter>.weight`` to the state dict.

    A layer type implements ``make_factors``, ``delta`` and ``forward``, in which each adapter in
    ``applied`` adds its update."""

    # Of these, each holds something by the adapter's name.
    by_adapter: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"),
        *("r", "lora_alpha", "scaling", "specs"),
    )
    added: ClassVar[tuple[str, ...]] = (*by_adapter, "split", *AdapterLayer.added)

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    specs: dict[str, AdapterSpec]
    split: Split | None  # set while an adapter's start has changed the base weight

    def start(self) -> None:
        super().start()
        lora_a, lora_b = bare(nn.ModuleDict), bare(nn.ModuleDict)
        lora_a.__dict__["_forward_pre_hooks"] = NO_FAST_PATH
        self._modules.update(lora_A=lora_a, lora_B=lora_b)
        self.__dict__.update(r={}, lora_alpha={}, scaling={}, specs={}, split=None)

    def end(self) -> None:
        if self.split is not None:
            drop_spare(self) if self.merged else end_split(self)
        super().end()

    def refresh(self) -> None:
        super().refresh()
        if self.split is not None and not self.merged:
            place_base(self, residual=self.split.name in self.applied)

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Add an adapter; its factors start as ``init_lora_weights`` says, drawn as PEFT draws them."""
        self.list_adapter(spec)
        self.make_factors(spec)
        self.start_factors(spec)
        self.settle_factors(spec)
        if changes_base(spec.config.init_lora_weights):
            split_base(self, spec)
        if spec.config.use_dora:
            start_magnitude(self, spec.name)

    def list_adapter(self, spec: AdapterSpec) -> None:
        """Note what ``spec`` says, and make its dropout."""
        name, dropout = spec.name, spec.config.lora_dropout
        self.r[name], self.lora_alpha[name], self.scaling[name] = spec.rank, spec.alpha, spec.scale
        self.specs[name] = spec
        if dropout or "lora_dropout" in self._modules:
            held = self._modules["lora_dropout"] = self.lora_dropout
            held[name] = nn.Dropout(dropout) if dropout else NO_DROPOUT

    def make_factors(self, spec: AdapterSpec) -> None:
        """Put fresh modules for ``spec.name`` into ``lora_A`` and ``lora_B``, in PEFT's order of draws."""
        raise NotImplementedError

    def start_factors(self, spec: AdapterSpec) -> None:
        start_factors(self, spec)

    def delta(self, name: str) -> Tensor:
        """The change of the base weight by one adapter, in the weight's shape, at least float32.

        Raises MergeError where the update is no change of the weight."""
        raise NotImplementedError

    def adapter_names(self) -> Collection[str]:
        return self.r

    def drop(self, name: str) -> None:
        if self.split is not None and self.split.name == name:
            end_split(self)
        for key in type(self).by_adapter:
            holder: Any = self._modules.get(key, self.__dict__.get(key))
            if holder is not None and name in holder:
                del holder[name]

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A (rank, in) and lora_B (out, rank) of one adapter."""
        # The same as self.lora_A[name].weight, without torch's slow attribute lookup on each call.
        modules: dict[str, Any] = self._modules
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_a._parameters["weight"], lora_b._parameters["weight"]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.r:
            return {}
        lora_a, lora_b = self.factors(name)
        tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
        if (bias := self.factor_bias(name)) is not None:
            tensors["lora_B.bias"] = bias
        return tensors | magnitude_tensors(self, name) if MAGNITUDES in self._modules else tensors

    def factor_bias(self, name: str) -> nn.Parameter | None:
        """The bias of one adapter's B, if it has one (``lora_bias``)."""
        modules: dict[str, Any] = self._modules
        return cast(nn.Parameter | None, modules["lora_B"]._modules[name]._parameters.get("bias"))

    def base_weight(self) -> Tensor:
        """The base weight as numbers, in the shape of ``delta``."""
        return cast(Tensor, self.weight)

    def base_weight_for(self, names: Collection[str]) -> Tensor:
        """The base weight that the adapters ``names`` are added to: the residual, if one of them split
        the base weight, else the original."""
        if self.split is None or (self.split.name in names) == self.split.in_place:
            return self.base_weight()
        return cast(Tensor, self.spare_weight)

    def changed_weight(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` (the base's, at least float32) with one adapter in it."""
        if name in self.lora_magnitude_vector:
            return rescaled_weight(self, name, weight)
        return weight + self.delta(name)

    def merged_weight(self, names: Collection[str]) -> Tensor:
        """The base weight with the adapters ``names`` in it, at least float32."""
        base = upcast(self.base_weight_for(names).detach())
        changed = [self.changed_weight(name, base) for name in names]
        return changed[0] if len(changed) == 1 else sum((weight - base for weight in changed), base)

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return self.with_bias(names, cast_merged(self.merged_weight(names), self.merged_like()))

    def with_bias(self, names: Collection[str], weight: Tensor) -> dict[str, Tensor]:
        """``weight`` as a merged value, beside the merged bias if there is one."""
        bias = self._merged_bias(names)
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def merged_like(self) -> Tensor:
        """A tensor of the dtype that a merged weight is stored in."""
        return cast(Tensor, self.weight)

    def _merged_bias(self, names: Collection[str]) -> Tensor | None:
        shifts = {n: b for n in names if (b := self.factor_bias(n)) is not None}
        if not shifts:
            return None
        bias = cast(Tensor | None, self.bias)
        if bias is None:
            raise MergeError(
                f"lora_bias adds a bias, and this {self.plain_class.__name__} has none to merge it into"
            )
        total = upcast(bias) + sum(self.scaling[n] * upcast(shift) for n, shift in shifts.items())
        return cast_merged(total, bias)

    def set_scale(self, name: str, factor: float) -> None:
        """Set the scale of one adapter to ``factor`` times what its config says."""
        if name in self.specs:
            self.scaling[name] = factor * self.specs[name].scale
            self.refresh()

    def scale_layer(self, factor: float) -> None:
        """Multiply the scale of the active adapters by ``factor``."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] *= factor
        self.refresh()

    def unscale_layer(self, factor: float | None = None) -> None:
        """Divide the scale of the active adapters by ``factor``; None sets it back to the config's."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] = self.specs[name].scale if factor is None else self.scaling[name] / factor
        self.refresh()

    def settle_factors(self, spec: AdapterSpec) -> None:
        """Move fresh factors to the device and dtype of the base, as PEFT does: through the base's dtype,
        and then to float32 where that is a half-precision one and ``spec.widen``."""
        home = self.merged_like()
        for parameter in self.adapter_tensors(spec.name).values():
            if parameter.dtype == home.dtype == torch.float32 and parameter.device == home.device:
                continue
            data = parameter.data.to(home.device)
            if home.dtype.is_floating_point and data.dtype != home.dtype:
                data = data.to(home.dtype)
            if spec.widen and data.dtype in HALF_DTYPES:
                data = data.float()
            parameter.data = data

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """``x`` after one adapter's dropout."""
        if self.training and self.specs[name].config.lora_dropout:
            return cast(Tensor, self.lora_dropout[name](x))
        return x

    @property
    def lora_dropout(self) -> Any:
        """A module of this layer only if some adapter drops anything."""
        held = self._modules.get("lora_dropout")
        return nn.ModuleDict(dict.fromkeys(self.r, NO_DROPOUT)) if held is None else held

    @property
    def lora_embedding_A(self) -> Any:
        return self._modules.get("lora_embedding_A", NO_ADAPTERS)

    @property
    def lora_embedding_B(self) -> Any:
        return self._modules.get("lora_embedding_B", NO_ADAPTERS)

    @property
    def lora_magnitude_vector(self) -> Any:
        return self._modules.get("lora_magnitude_vector", NO_ADAPTERS)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={self.r[name]} alpha={self.lora_alpha[name]:g} scale={self.scaling[name]:g}"
            for name in self.r
        )
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}adapters=[{adapters}]"


# What nn.Module.__init__ puts on an object: the constants, and what makes each of the empty containers.
CONSTANTS = {key: value for key, value in vars(nn.Module()).items() if isinstance(value, bool | None)}
CONTAINERS = [(key, type(value)) for key, value in vars(nn.Module()).items() if key not in CONSTANTS]


def bare(kind: type[Module]) -> Module:
    """An object of ``kind`` as ``nn.Module.__init__`` leaves it, in half the time."""
    module = kind.__new__(kind)
    own = module.__dict__
    own.update(CONSTANTS)
    for key, container in CONTAINERS:
        own[key] = container()
    return module


def linear_factor(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """``nn.Linear(in_features, out_features, bias)`` with the same random draws, made faster."""
    layer = bare(nn.Linear)
    weight = torch.empty(out_features, in_features)
    draw_kaiming(weight)
    drawn_bias = None
    if bias:
        bound = 1 / math.sqrt(in_features)
        drawn_bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
    layer.__dict__.update(in_features=in_features, out_features=out_features)
    layer._parameters.update(weight=nn.Parameter(weight), bias=drawn_bias)
    return layer
