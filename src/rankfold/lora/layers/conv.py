"""LoRA for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.kernels.low_rank import low_rank_delta
from rankfold.lora.layers.base import AdapterSpec, upcast
from rankfold.lora.layers.dora import row_factors
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.registry import computes_otherwise, register_layer


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
        found = super().problems(layer, spec)
        if spec.rank % groups:
            found.append(
                f"Targeting a {kind} with groups={groups} and rank {spec.rank}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different "
                "rank or do not target this specific layer."
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
        rows = self.row_factors(name).view(channels)
        base = upcast(base) if self.bias is None else upcast(base) - self.bias.view(channels)
        return (rows - 1) * base + rows * self.update(name, dropped)

    def row_factors(self, name: str, weight: Tensor | None = None) -> Tensor:
        """As the base class says.  In groups the update is no change of the weight, and PEFT's files mean the
        norms that it takes: of the weight plus ``B A`` brought into the weight's shape."""
        if self.groups == 1:
            return super().row_factors(name, weight)
        return row_factors(self.lora_magnitude_vector[name].weight, self._grouped_norms(name))

    def start_norms(self, name: str) -> Tensor:
        return super().start_norms(name) if self.groups == 1 else self._grouped_norms(name)

    def _grouped_norms(self, name: str) -> Tensor:
        lora_a, lora_b = (factor.detach() for factor in self.factors(name))
        weight, rank = upcast(self.base_weight().detach()), lora_a.shape[0]
        delta = (lora_b.reshape(-1, rank) @ lora_a.reshape(rank, -1)).reshape(weight.shape)
        return (weight + self.scaling[name] * delta).flatten(1).norm(dim=1)  # type: ignore[no-any-return]

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
