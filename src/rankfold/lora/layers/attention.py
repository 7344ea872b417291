"""LoRA for ``nn.MultiheadAttention``.

That layer calls no linear layer: it hands ``in_proj_weight`` and ``out_proj.weight`` to one fused
function, and so does the fast path of ``nn.TransformerEncoderLayer``.  So an adapted layer shows, under
the weight's own name, the weight with the updates in it, worked out anew and differentiable; the base
weight lies untouched in ``_parameters``, where the state dict, ``to()`` and optimisers find it.  (PEFT
writes the update into the base weight before each call and subtracts it afterwards, which drifts.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from threading import get_ident
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankfold.compat import is_flattened
from rankfold.kernels.low_rank import low_rank_delta
from rankfold.lora.layers.base import AdapterSpec, upcast
from rankfold.lora.layers.factors import LoraLayer, linear_factor
from rankfold.lora.layers.registry import adapt, register_layer

# PEFT 0.21.2 adds the update of out_proj twice (MultiheadAttention.merge adds it and then calls
# out_proj.merge), merged or not, so this is what an adapter in one of its files means.
OUT_PROJ_TIMES = 2


class ShownWeight(LoraLayer):
    """A layer that shows its weight ``weight_name`` with the updates of its active adapters in it."""

    weight_name: ClassVar[str]
    added: ClassVar[tuple[str, ...]] = ("_shown", *LoraLayer.added)
    row_dim: ClassVar[int | None] = 0

    _shown: dict[int, Tensor]  # by thread, within a forward

    def start(self) -> None:
        super().start()
        self.__dict__["_shown"] = {}

    def base_weight(self) -> Tensor:
        return cast(Tensor, self._parameters[self.weight_name])

    def merged_like(self) -> Tensor:
        return self.base_weight()

    def shown_weight(self) -> Tensor | None:
        if not self.applied:
            return self._parameters[self.weight_name]
        if self._shown and not torch.compiler.is_compiling():
            shown = self._shown.get(get_ident())
            if shown is not None:
                return shown
        base = self._parameters.get(self.weight_name)
        if base is None or is_flattened(base):
            return self._while_cut(base)
        total = wide = upcast(base)
        for name in self.applied:
            if "weight" not in self.lora_B[name]._parameters:
                return self._while_cut(base)
            total = total + (self.changed_weight(name, wide) - wide)
        return total.to(base.dtype)

    def _while_cut(self, base: Tensor | None) -> Tensor:
        """The bare weight, which FSDP takes away, asks for, compares and writes back outside of a forward."""
        if base is None:
            raise AttributeError(self.weight_name)
        return base

    def make_factors(self, spec: AdapterSpec) -> None:
        rows, columns = self.base_weight().shape
        self.lora_A[spec.name] = linear_factor(columns, spec.rank)
        self.lora_B[spec.name] = linear_factor(spec.rank, rows)

    def delta(self, name: str) -> Tensor:
        """``scale * B A`` (out, in), at least float32."""
        return low_rank_delta(*self.factors(name), self.scaling[name])


class ShownLinear(ShownWeight):
    """A linear layer that shows its weight; its own forward reads the shown one too."""

    weight_name = "weight"

    @property
    def weight(self) -> Tensor | None:
        return self.shown_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = value  # type: ignore[assignment]


class LoraOutProjection(ShownLinear, NonDynamicallyQuantizableLinear):  # type: ignore[misc]
    """The ``out_proj`` of an attention layer."""

    plain_class = NonDynamicallyQuantizableLinear


class LoraReadLinear(ShownLinear, nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight the module around it reads (see ``placing/read_weights``), called or not.

    The update is in the weight, so ``lora_dropout`` has no effect on it."""

    plain_class = nn.Linear
    is_matrix = True

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        found = super().problems(layer, spec)
        if spec.config.lora_bias:
            found.append("its weight is read from outside, where lora_bias has no place")
        return found


class LoraMultiheadAttention(ShownWeight, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with updates of ``in_proj_weight`` and ``out_proj.weight``, always both.

    Adds ``lora_A.<adapter>.weight`` (rank, features) and ``lora_B.<adapter>.weight`` (3 features, rank) for
    the projections of query, key and value, and makes ``out_proj`` an adapter layer of its own."""

    plain_class = nn.MultiheadAttention
    weight_name = "in_proj_weight"

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        config = spec.config
        if layer._parameters.get("in_proj_weight") is None:
            return ["Only same embed for query/key/value is supported as of now for MultiheadAttention"]
        found = super().problems(layer, spec)
        if config.lora_bias:
            found.append("lora_bias has no place in an attention layer")
        return found

    @property
    def in_features(self) -> int:
        return int(self.embed_dim)

    @property
    def out_features(self) -> int:
        return int(3 * self.embed_dim)

    @property  # type: ignore[override]
    def in_proj_weight(self) -> Tensor | None:
        return self.shown_weight()

    @in_proj_weight.setter
    def in_proj_weight(self, value: Tensor) -> None:  # by libraries that put views of sharded memory here
        self._parameters["in_proj_weight"] = value  # type: ignore[assignment]

    def add_adapter(self, spec: AdapterSpec) -> None:
        out_proj = adapt(self.out_proj, LoraOutProjection)
        doubled = dataclasses.replace(spec, alpha=OUT_PROJ_TIMES * spec.alpha)
        if not self.r:  # PEFT draws the first start of out_proj twice, and one seed shall give one start
            out_proj.add_adapter(doubled)
        super().add_adapter(spec)
        out_proj.add_adapter(doubled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.applied:
            return super().forward(*args, **kwargs)
        layers = [layer for layer in (self, self.out_proj) if isinstance(layer, ShownWeight)]
        thread = get_ident()
        try:  # the layer's forward asks up to five times for each weight
            for layer in layers:
                layer._shown[thread] = cast(Tensor, layer.shown_weight())
            return super().forward(*args, **kwargs)
        finally:
            for layer in layers:
                layer._shown.pop(thread, None)

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return {self.weight_name: super().merged_values(names)["weight"]}


register_layer(NonDynamicallyQuantizableLinear, LoraOutProjection)
register_layer(nn.MultiheadAttention, LoraMultiheadAttention)
