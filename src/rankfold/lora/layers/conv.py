"""LoRA for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.kernels.low_rank import low_rank_delta
from rankfold.lora.layers.base import AdapterSpec, computes_otherwise, register_layer, upcast
from rankfold.lora.layers.dora import row_factors
from rankfold.lora.layers.factors import LoraLayer


class ConvUpdates(LoraLayer):
    """The low-rank update of a convolution: A convolves as the base does, into ``rank`` channels, and B
    mixes them, a 1x1 convolution in the base's groups.

    Shapes as in PEFT: lora_A (rank, in, *kernel), never grouped, and lora_B (out, rank / groups, 1, ...).
    PEFT 0.21.2 builds A without the base's dilation and padding_mode, so that its forward is another
    function than its merged weight; here A has both."""

    row_dim: ClassVar[int | None] = 0
    conv: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    bias: nn.Parameter | None

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        kind, groups = type(layer).__name__, cast(int, layer.groups)
        found = []
        if spec.rank % groups:
            found.append(
                f"rank {spec.rank} is no multiple of the {groups} groups of this {cls.conv.__name__}"
            )
        if spec.config.use_dora and groups > 1:
            found.append(
                f"use_dora is not for a {cls.conv.__name__} in {groups} groups, whose update is no "
                "change of its weight"
            )
        if computes_otherwise(layer, cls.conv, ["forward", "_conv_forward"]):
            found.append(
                f"a {kind} has a forward of its own; if adding the update that a {cls.conv.__name__} would "
                f"have is right for it, say register_layer({kind}, Lora{cls.conv.__name__})"
            )
        return found

    @property
    def in_features(self) -> int:
        return self.in_channels

    @property
    def out_features(self) -> int:
        return self.out_channels

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = total = cast(Tensor, super().forward(x, *args, **kwargs))
        for name in self.applied:
            dropped = self.dropped(name, x.to(self.factors(name)[0].dtype))
            dora = self.specs[name].config.use_dora
            total = total + (self.rescaled(name, dropped, base) if dora else self.update(name, dropped))
        return total.to(base.dtype)

    def rescaled(self, name: str, dropped: Tensor, base: Tensor) -> Tensor:
        """What one DoRA adapter adds for an x, before its dropout, for which the plain layer gives ``base``.

        Under dropout the base part of the update sees the dropped-out x too, as in PEFT."""
        if self.training and self.specs[name].config.lora_dropout:
            base = cast(Tensor, super().forward(dropped.to(base.dtype)))
        channels = (-1, *[1] * len(self.kernel_size))
        rows = row_factors(self, name, self.base_weight()).view(channels)
        base = upcast(base) if self.bias is None else upcast(base) - self.bias.view(channels)
        return (rows - 1) * base + rows * self.update(name, dropped)

    def update(self, name: str, x: Tensor) -> Tensor:
        """What one adapter adds for ``x`` (batch, in, *space): (batch, out, *space), both in its dtype."""
        return cast(Tensor, self.lora_B[name](self.lora_A[name](x)) * self.scaling[name])

    def make_factors(self, spec: AdapterSpec) -> None:
        shape = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        like_base: dict[str, Any] = {option: getattr(self, option) for option in shape}
        bias = spec.config.lora_bias
        self.lora_A[spec.name] = self.conv(self.in_channels, spec.rank, bias=False, **like_base)
        self.lora_B[spec.name] = self.conv(spec.rank, self.out_channels, 1, groups=self.groups, bias=bias)

    def delta(self, name: str) -> Tensor:
        """``scale * B A`` (out, in, *kernel), at least float32."""
        if self.groups > 1:
            raise MergeError(
                f"lora_A of a convolution in {self.groups} groups reads all channels, the weight only those "
                "of its own group, so the update is no change of the weight"
            )
        lora_a, lora_b = self.factors(name)
        delta = low_rank_delta(lora_a.flatten(1), lora_b.flatten(1), self.scaling[name])
        return delta.view(cast(Tensor, self.weight).shape)


class LoraConv1d(ConvUpdates, nn.Conv1d):  # type: ignore[misc]
    plain_class = conv = nn.Conv1d


class LoraConv2d(ConvUpdates, nn.Conv2d):  # type: ignore[misc]
    plain_class = conv = nn.Conv2d


class LoraConv3d(ConvUpdates, nn.Conv3d):  # type: ignore[misc]
    plain_class = conv = nn.Conv3d


for adapted in (LoraConv1d, LoraConv2d, LoraConv3d):
    register_layer(adapted.conv, adapted)
