"""VeLoRA keeps, instead of A's input, one number for each group of its features, and makes the gradient of A
from these.  Miles et al. 2024, arXiv 2405.17991."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.lora.config.variant_configs import VeloraConfig
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.variants.variant import HeldTensors, Variant, plain_update

HELD = "lora_velora_embed"


class VeloraProjection(nn.Module):
    """The direction (group) onto which each group of features is projected."""

    lora_velora_embed: Tensor

    def __init__(self, config: VeloraConfig, in_features: int, like: Tensor) -> None:
        super().__init__()
        self.config = config
        size = -(-in_features // config.num_groups)
        drawn = torch.randn(size) if config.init_type == "random" else torch.zeros(size)
        self.register_buffer("lora_velora_embed", _unit(drawn).to(like))
        self.is_set = config.init_type == "random"

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x A^T`` for x (..., in) and A (rank, in); a gradient of A is made from the projections of x."""
        if self.config.init_type == "batch_average" or not self.is_set:
            mean = self.grouped(x.detach()).flatten(0, 1).float().mean(0)
            self.lora_velora_embed, self.is_set = _unit(mean).to(self.lora_velora_embed), True
        embed, scale = self.lora_velora_embed, self.config.scale
        out = _VeloraProduct.apply(x, weight, embed, self.config.num_groups, scale)  # type: ignore[no-untyped-call]
        return out  # type: ignore[no-any-return]

    def grouped(self, x: Tensor) -> Tensor:
        return _grouped(x, self.config.num_groups)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """x (..., features) as (tokens, groups, features of a group), zeros at the end."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def _unit(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector)
    return vector / length if length > 0 else torch.ones_like(vector) / len(vector) ** 0.5  # type: ignore[no-any-return]


class _VeloraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, embed: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(_grouped(x, groups) @ embed.to(x.dtype), weight, embed)
        ctx.shape, ctx.scale = x.shape, scale
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight, embed = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(gradient.dtype)).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            wide = (narrow.unsqueeze(-1) * embed.to(narrow.dtype)).flatten(1)[:, : ctx.shape[-1]]
            of_weight = (gradient.T @ wide.to(gradient.dtype) * ctx.scale).to(weight.dtype)
        return of_x, of_weight, None, None, None


def _start(layer: Any, spec: AdapterSpec) -> None:
    config = cast(VeloraConfig, spec.config.velora_config)
    layer.hold(HELD, spec.name, VeloraProjection(config, layer.in_features, layer.factors(spec.name)[0].data))


def _update(layer: Any, name: str, x: Tensor, out: Tensor) -> Tensor:
    lora_a, lora_b = layer.factors(name)
    if not (layer.training and torch.is_grad_enabled()):
        return plain_update(layer, name, x, out, (lora_a, lora_b))
    narrow = layer.lora_velora_embed[name](layer.dropped(name, x).to(lora_a.dtype), lora_a)
    total: Tensor = out + (layer.scaling[name] * F.linear(narrow, lora_b)).to(out.dtype)
    return total


def _tensors(layer: Any, name: str) -> HeldTensors:
    return {HELD: layer.lora_velora_embed[name].lora_velora_embed}


VELORA = Variant(_start, update=_update, tensors=_tensors)
