"""LoRA for ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.kernels import few_rows
from rankfold.kernels.dropout import DropMask
from rankfold.kernels.frozen import FrozenMatrix
from rankfold.kernels.fused_linear import can_fuse, fused_linear
from rankfold.kernels.low_rank import add_low_rank_update, low_rank_delta
from rankfold.lora.layers.base import AdapterSpec, upcast
from rankfold.lora.layers.dora import add_rescaled_update
from rankfold.lora.layers.factors import LoraLayer, linear_factor
from rankfold.lora.layers.registry import register_layer
from rankfold.lora.starts.parts import needs_weight

FUSED_FROM = 1 << 15  # elements of an input; below, starting the operations takes longer than they do


class LinearUpdates(LoraLayer):
    """The low-rank update of a layer that maps (..., in) to (..., out)."""

    row_dim: ClassVar[int | None] = 0
    is_matrix: ClassVar[bool] = True
    has_variants: ClassVar[bool] = True

    in_features: int
    out_features: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base = cast(Tensor, super().forward(x, *args, **kwargs))
        for name in self.applied:
            dora = self.specs[name].config.use_dora
            out = self.rescaled(name, x, out, base) if dora else self.updated(name, x, out)
        return out

    def updated(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """``out`` with the update of one adapter."""
        variant, scale = self.lora_variant.get(name), self.scaling[name]
        if variant is not None and variant.update is not None:
            return variant.update(self, name, x, out)
        if self.training:
            x = self.dropped(name, x)
        if self.specs[name].config.lora_bias:
            out = out + (scale * cast(Tensor, self.lora_B[name].bias)).to(out.dtype)
        return add_low_rank_update(out, x, *self.pair(name), scale)

    def rescaled(self, name: str, x: Tensor, out: Tensor, base: Tensor) -> Tensor:
        """``out`` with the update of one DoRA adapter; ``base`` is the plain layer's output for x.

        Under dropout the base part of the update sees the dropped-out x too, as in PEFT."""
        if self.training and self.specs[name].config.lora_dropout:
            x = self.dropped(name, x)
            base = cast(Tensor, super().forward(x))
        bias = self._parameters.get("bias")
        base = upcast(base) if bias is None else upcast(base) - bias
        return add_rescaled_update(
            out, base, x, self.factors(name), self.row_factors(name), self.scaling[name]
        )

    def make_factors(self, spec: AdapterSpec) -> None:
        lora_a = linear_factor(self.in_features, spec.rank)
        lora_b = linear_factor(spec.rank, self.out_features, bias=spec.config.lora_bias)
        self.lora_A[spec.name], self.lora_B[spec.name] = lora_a, lora_b

    def delta(self, name: str) -> Tensor:
        """``scale * B A`` (out, in), at least float32."""
        return low_rank_delta(*self.pair(name), self.scaling[name])


class FusedUpdates(LinearUpdates):
    """The update of one plain adapter made together with the layer's own product, for large inputs."""

    added: ClassVar[tuple[str, ...]] = ("_plain", *LinearUpdates.added)

    _plain: str | None  # the adapter that is applied, if that is one and nothing but its factors

    def fused_base(self) -> tuple[Tensor | FrozenMatrix, Tensor | None] | None:
        """The weight and the bias as ``fused_linear`` takes them, if it can."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """What the layer computes without adapters."""
        return cast(Tensor, super(LinearUpdates, self).forward(x))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        out = self.fused(x)
        if out is None:  # what the loop over the adapters would do, in less time
            out = self.plain(x)
            seen = self.dropped(name, x) if self.training else x
            out = add_low_rank_update(out, seen, *self.factors(name), self.scaling[name])
        return out

    def fused(self, x: Tensor, up: Tensor | None = None) -> Tensor | None:
        """The output for ``x``, or for silu(x) * up, as one autograd function; None for a small input and
        where there cannot be one."""
        name = self._plain
        if name is None or type(x) is not Tensor or x.numel() < FUSED_FROM or torch.compiler.is_compiling():
            return None
        base, factors, mask = self.fused_base(), self.factors(name), None
        ordinary = all(type(factor) is nn.Parameter for factor in factors)
        if base is None or not ordinary or not can_fuse(x, base[0], *factors):
            return None
        if self.training and self.specs[name].config.lora_dropout:
            dropout = self.lora_dropout[name]
            if x.device.type != "cpu" or type(dropout) is not nn.Dropout or not 0 < dropout.p < 1:
                return None  # torch's own there
            mask = DropMask.draw(dropout.p) if dropout.training else None
        return fused_linear(x, base, factors, self.scaling[name], mask, up)

    def refresh(self) -> None:
        super().refresh()
        only = self.applied[0] if len(self.applied) == 1 and type(self) in FUSED_CLASSES else None
        if only is not None:
            config = self.specs[only].config
            apart = config.lora_bias or config.use_dora or only in self.lora_variant
            only = None if apart or isinstance(self.scaling[only], Tensor) else only
        self.__dict__["_plain"] = only


class LoraLinear(FusedUpdates, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` plus the low-rank updates of its active adapters.

    Adds the state dict keys ``lora_A.<adapter>.weight`` (rank, in) and ``lora_B.<adapter>.weight``
    (out, rank); ``weight`` and ``bias`` keep their names."""

    plain_class = nn.Linear

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        if is_torchao(layer.weight) and needs_weight(layer, spec.config):
            return [
                f"its weight is a torchao {type(layer.weight).__name__}, which the starts that change the "
                "base weight cannot work with; dequantise(model) first"
            ]
        return super().problems(layer, spec)

    def base_weight(self) -> Tensor:
        weight: Any = super().base_weight()
        plain = type(weight) is nn.Parameter or not is_torchao(weight)
        return cast(Tensor, weight if plain else weight.dequantize().float())

    def fused_base(self) -> tuple[Tensor | FrozenMatrix, Tensor | None] | None:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return (weight, bias) if type(weight) is nn.Parameter else None

    def plain(self, x: Tensor) -> Tensor:
        own = self._parameters  # torch looks up self.weight at the cost of a fifth of a small product
        return few_rows.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        if is_torchao(self.weight):
            kind = type(self.weight).__name__
            raise MergeError(f"its weight is a torchao {kind}, which holds no sum; dequantise(model) first")
        return super().merged_values(names)


class LoraConv1D(LinearUpdates):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""

    row_dim: ClassVar[int | None] = 1

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return int(cast(Tensor, self.weight).shape[0])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return int(cast(Tensor, self.weight).shape[1])

    @property
    def fan_in_fan_out(self) -> bool:
        return True

    def delta(self, name: str) -> Tensor:
        return super().delta(name).T


def is_torchao(weight: object) -> bool:
    """Whether a weight is one of torchao's quantised tensors: the layer around it stays an ``nn.Linear``."""
    return type(weight).__module__.split(".")[0] == "torchao"


FUSED_CLASSES: set[type[nn.Module]] = {LoraLinear}  # not their subclasses, which may compute otherwise

register_layer(nn.Linear, LoraLinear)
register_layer("transformers.pytorch_utils.Conv1D", LoraConv1D)
