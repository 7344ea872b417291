"""LoRA for ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from rankfold.kernels.low_rank import low_rank_delta, low_rank_update
from rankfold.lora.factors import LoraLayer, linear_factor
from rankfold.lora.layers import AdapterSpec, register_layer


class LinearUpdates(LoraLayer):
    """The low-rank update of a layer that maps (..., in) to (..., out)."""

    in_features: int
    out_features: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = cast(Tensor, super().forward(x, *args, **kwargs))
        for name in self.applied:
            out = self.updated(name, x, out)
        return out

    def updated(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """``out`` with the update of one adapter."""
        factor = self.lora_B[name]
        update = low_rank_update(self.lora_dropout[name](x), *self.factors(name), self.scaling[name])
        if factor.bias is not None:
            update = update + self.scaling[name] * cast(Tensor, factor.bias)
        return out + update.to(out.dtype)

    def make_factors(self, spec: AdapterSpec) -> None:
        self.lora_A[spec.name] = linear_factor(self.in_features, spec.rank)
        self.lora_B[spec.name] = linear_factor(spec.rank, self.out_features, bias=spec.config.lora_bias)

    def delta(self, name: str) -> Tensor:
        """``scale * B A`` (out, in), at least float32."""
        return low_rank_delta(*self.factors(name), self.scaling[name])


class LoraLinear(LinearUpdates, nn.Linear):  # type: ignore[misc] # forward takes more than it must
    """``nn.Linear`` plus the low-rank updates of its active adapters.

    Adds the state dict keys ``lora_A.<adapter>.weight`` (rank, in) and ``lora_B.<adapter>.weight``
    (out, rank); ``weight`` and ``bias`` keep their names."""

    plain_class = nn.Linear


class LoraConv1D(LinearUpdates):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return int(cast(Tensor, self.weight).shape[0])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return int(cast(Tensor, self.weight).shape[1])

    def delta(self, name: str) -> Tensor:
        return super().delta(name).T


register_layer(nn.Linear, LoraLinear)
register_layer("transformers.pytorch_utils.Conv1D", LoraConv1D)
