"""BD-LoRA: one factor of a pair is block-diagonal, and only its blocks are kept.

Engines that cut a layer among devices then need not exchange what lies between the factors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.lora.config.variant_configs import BdLoraConfig
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.variants.variant import Pair, Variant


class BlockDiagonalLinear(nn.Module):
    """A linear map whose matrix is block-diagonal; ``weight`` (out, in / nblocks) holds the blocks one above
    the other.  The name and the start are PEFT's."""

    def __init__(
        self, in_features: int, out_features: int, nblocks: int, init_zero: bool = False, **like: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks, **like))
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_as_blockdiagonal_matrix())

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.chunk(self.nblocks))  # type: ignore[no-any-return]


def _side(spec: AdapterSpec) -> tuple[bool, bool]:
    """Whether A and B of a target are block-diagonal."""
    config = cast(BdLoraConfig, spec.config.use_bdlora)
    patterns = config.target_modules_bd_a or (), config.target_modules_bd_b or ()
    of_a, of_b = (any(text in spec.target for text in texts) for texts in patterns)
    return of_a, of_b


def _start(layer: Any, spec: AdapterSpec) -> None:
    blocks = cast(BdLoraConfig, spec.config.use_bdlora).nblocks
    of_a, of_b = _side(spec)
    like = {"dtype": layer.factors(spec.name)[0].dtype, "device": layer.factors(spec.name)[0].device}
    if of_a:
        layer.lora_A[spec.name] = BlockDiagonalLinear(layer.in_features, spec.rank, blocks, **like)
    if of_b:
        layer.lora_B[spec.name] = BlockDiagonalLinear(
            spec.rank, layer.out_features, blocks, init_zero=True, **like
        )


def _pair(layer: Any, name: str) -> Pair:
    lora_a, lora_b = (
        side[name].weight_as_blockdiagonal_matrix()
        if isinstance(side[name], BlockDiagonalLinear)
        else side[name].weight
        for side in (layer.lora_A, layer.lora_B)
    )
    return lora_a, lora_b


def _problems(layer: nn.Module, spec: AdapterSpec) -> list[str]:
    config, (of_a, of_b) = cast(BdLoraConfig, spec.config.use_bdlora), _side(spec)
    if of_a and of_b:
        return [f"Target {spec.target} matches both A and B block-diagonal patterns"]
    if config.match_strict and not (of_a or of_b):
        return [
            f"Target {spec.target} matches neither A nor B block-diagonal patterns. If this is intentional, "
            "set match_strict=False in BdLoraConfig"
        ]
    side = {"in_features": of_a, "out_features": of_b, "r": of_a or of_b}
    sizes = {name: getattr(layer, name, spec.rank) if name != "r" else spec.rank for name in side}
    return [
        f"{name}={sizes[name]} is not divisible by nblocks={config.nblocks}"
        for name, counts in side.items()
        if counts and sizes[name] % config.nblocks
    ]


BDLORA = Variant(_start, pair=_pair, problems=_problems)
