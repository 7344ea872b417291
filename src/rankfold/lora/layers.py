"""LoRA layers: static subclasses of the layers they adapt, made in place.

``adapt`` turns a plain layer into its LoRA subclass by changing the object's class, as
``torch.nn.utils.parametrize`` does: the object, its weight, its hooks and every other reference to it
stay what they were, its state dict gains keys and renames none, and ``restore`` turns it back."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.kernels.low_rank import low_rank_delta, low_rank_update
from rankfold.lora.config import LoraConfig

MIN_FLOAT_BYTES = 4  # adapters are float32 even on a half-precision base, as in PEFT


class LoraLinear(nn.Linear):
    """``nn.Linear`` plus the low-rank updates of its active adapters.

    Adds the state dict keys ``lora_A.<adapter>.weight`` (rank, in) and ``lora_B.<adapter>.weight``
    (out, rank); ``weight`` and ``bias`` keep their names."""

    plain_class = nn.Linear
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            update = low_rank_update(self.lora_dropout[name](x), *self.factors(name), self.scaling[name])
            out = out + update.to(out.dtype)
        return out

    def start_lora(self) -> None:
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r, self.lora_alpha, self.scaling = {}, {}, {}
        self.active_adapters, self.disable_adapters = [], False

    def end_lora(self) -> None:
        for name in LORA_ATTRIBUTES:
            delattr(self, name)

    def add_adapter(self, name: str, rank: int, alpha: float, config: LoraConfig) -> None:
        """Add an adapter whose update starts at zero (unless ``init_lora_weights`` is False).

        The random draws are PEFT's, in PEFT's order, so that one seed gives the same A in both."""
        dtype = torch.float32 if self.weight.dtype.itemsize < MIN_FLOAT_BYTES else self.weight.dtype
        self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False, dtype=dtype)
        self.lora_B[name] = nn.Linear(rank, self.out_features, bias=False, dtype=dtype)
        if config.init_lora_weights:
            _start_at_zero(*self.factors(name), config)
        self.lora_A[name].to(self.weight.device)
        self.lora_B[name].to(self.weight.device)
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.r[name], self.lora_alpha[name] = rank, alpha
        self.scaling[name] = config.scale(rank, alpha)
        self.active_adapters.append(name)

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A (rank, in) and lora_B (out, rank) of one adapter."""
        return cast(nn.Parameter, self.lora_A[name].weight), cast(nn.Parameter, self.lora_B[name].weight)

    def delta(self, name: str) -> Tensor:
        """The weight change of one adapter, ``scale * B A`` (out, in), float32."""
        return low_rank_delta(*self.factors(name), self.scaling[name])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Base weight plus the active deltas, summed in float32 and cast once to the weight's dtype.

        Raises MergeError if the sum is not finite in that dtype."""
        total = self.weight.float()
        for name in self.active_adapters:
            total = total + self.delta(name)
        merged = total.to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise MergeError(
                f"the merged weight is not finite in {self.weight.dtype}: largest magnitude "
                f"{total.abs().max().item():.4g}; merge into a wider dtype or repair the adapter"
            )
        return merged

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={self.r[name]} alpha={self.lora_alpha[name]:g} scale={self.scaling[name]:g}"
            for name in self.r
        )
        return f"{super().extra_repr()}, adapters=[{adapters}]"


LORA_ATTRIBUTES = (
    "lora_A",
    "lora_B",
    "lora_dropout",
    "r",
    "lora_alpha",
    "scaling",
    "active_adapters",
    "disable_adapters",
)
# Exact types only: a subclass may compute something else in its forward, or never call it.
LORA_CLASSES: dict[type[nn.Module], type[LoraLinear]] = {nn.Linear: LoraLinear}


def adapt(layer: nn.Module) -> LoraLinear:
    """Turn a layer whose type is in ``LORA_CLASSES`` into its LoRA subclass, in place."""
    layer.__class__ = LORA_CLASSES[type(layer)]
    adapted = cast(LoraLinear, layer)
    adapted.start_lora()
    return adapted


def restore(layer: LoraLinear) -> None:
    """Turn a LoRA layer back into the plain layer it was made from, in place."""
    layer.end_lora()
    layer.__class__ = layer.plain_class  # type: ignore[assignment]


def _start_at_zero(lora_a: Tensor, lora_b: Tensor, config: LoraConfig) -> None:
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    nn.init.zeros_(lora_b)
