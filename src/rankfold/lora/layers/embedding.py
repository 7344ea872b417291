"""LoRA for ``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import MergeError
from rankfold.kernels.low_rank import low_rank_delta
from rankfold.lora.layers.base import AdapterSpec, upcast
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import computes_otherwise, register_layer

FACTORS = ("lora_embedding_A", "lora_embedding_B")


class LoraEmbedding(LoraLayer, nn.Embedding):
    """``nn.Embedding`` plus the low-rank updates of its active adapters.

    Adds the state dict keys ``lora_embedding_A.<adapter>`` (rank, tokens) and
    ``lora_embedding_B.<adapter>`` (features, rank), parameters without ``.weight`` as in PEFT.
    Also as in PEFT, ``lora_dropout`` does not touch an embedding (a token id cannot be dropped), and A
    starts at zero, B normal, whatever start is asked for, unless that is False."""

    plain_class = nn.Embedding
    row_dim: ClassVar[int | None] = 1
    own_start: ClassVar[bool] = True
    adapter_layer_names: ClassVar[tuple[str, ...]] = (*FACTORS, *LoraLayer.adapter_layer_names)
    added: ClassVar[tuple[str, ...]] = (*FACTORS, *LoraLayer.added)

    def start(self) -> None:
        super().start()
        for side in FACTORS:
            self._modules[side] = nn.ParameterDict()

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        found = super().problems(layer, spec)
        found += ["lora_bias=True is not supported for Embedding"] if spec.config.lora_bias else []
        if spec.config.use_dora and layer.max_norm is not None:
            found.append("max_norm and use_dora each set the norms of the weight; take one of them")
        if not hasattr(layer, "embed_scale") and computes_otherwise(layer, nn.Embedding, ["forward"]):
            found.append(
                f"a {type(layer).__name__} has a forward of its own; if adding the update for the same ids "
                f"is right for it, say register_layer({type(layer).__name__}, LoraEmbedding)"
            )
        return found

    @property
    def in_features(self) -> int:
        return self.num_embeddings

    @property
    def out_features(self) -> int:
        return self.embedding_dim

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        base = total = super().forward(ids, *args, **kwargs)
        for name in self.applied:
            if self.specs[name].config.use_dora:
                rows = self.row_factors(name)
                total = total + (rows - 1) * upcast(base) + rows * self.update(name, ids)
            else:
                total = total + self.update(name, ids)
        return total.to(base.dtype)

    def update(self, name: str, ids: Tensor) -> Tensor:
        """What one adapter adds for ``ids`` (...): (..., features), in the dtype of the factors."""
        lora_a, lora_b = self.factors(name)
        narrow = F.embedding(
            ids,
            lora_a.T,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )  # not sparse: the gradient of a transposed weight cannot be, and PEFT's training fails on it
        return F.linear(narrow * self.scaling[name] * self.output_scale(), lora_b)

    def output_scale(self) -> Tensor | float:
        """The factor by which the layer multiplies what it looks up: ``embed_scale`` of Gemma and Bart.

        Where that is a tensor, as in Gemma, the layer rounds it to the weight's dtype, so it is here too."""
        scale = getattr(self, "embed_scale", None)
        if isinstance(scale, Tensor):
            return scale.to(self.weight.dtype)
        return 1.0 if scale is None else float(scale)

    def make_factors(self, spec: AdapterSpec) -> None:
        shapes = (spec.rank, self.num_embeddings), (self.embedding_dim, spec.rank)
        for side, shape in zip(FACTORS, shapes, strict=True):
            self._side(side)[spec.name] = nn.Parameter(torch.randn(shape))

    def start_factors(self, spec: AdapterSpec) -> None:
        lora_a, lora_b = self.factors(spec.name)
        lora_a.zero_()
        lora_b.normal_()

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_embedding_A (rank, tokens) and lora_embedding_B (features, rank) of one adapter."""
        lora_a, lora_b = (self._side(side)._parameters[name] for side in FACTORS)
        return cast(nn.Parameter, lora_a), cast(nn.Parameter, lora_b)

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.r:
            return {}
        return dict(zip(FACTORS, self.factors(name), strict=True)) | self.magnitude_tensors(name)

    def delta(self, name: str) -> Tensor:
        """``scale * (B A)^T`` (tokens, features), at least float32."""
        if self.max_norm is not None:
            raise MergeError(
                "max_norm limits the norm of the weight and that of the update one by one, and of a merged "
                "weight it would limit the sum"
            )
        return low_rank_delta(*self.factors(name), self.scaling[name]).T

    def _merged_bias(self, names: Collection[str]) -> None:
        return None

    def _side(self, side: str) -> nn.ParameterDict:
        return cast(nn.ParameterDict, self._modules[side])


register_layer(nn.Embedding, LoraEmbedding)
