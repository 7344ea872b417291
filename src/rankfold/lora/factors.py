"""``LoraLayer``: an adapter layer whose adapters are pairs of low-rank factors."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.layers import HALF_DTYPES, AdapterLayer, AdapterSpec, cast_merged, wide

NO_ADAPTERS = nn.ModuleDict()


class LoraLayer(AdapterLayer):
    """Adds ``lora_A.<adapter>.weight`` and ``lora_B.<adapter>.weight`` to the state dict.

    A layer type implements ``make_factors``, ``delta`` and ``forward``, in which each adapter in
    ``applied`` adds its update."""

    added: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_dropout", "r", "lora_alpha", "scaling", "specs"),
        *AdapterLayer.added,
    )

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    specs: dict[str, AdapterSpec]

    def start(self) -> None:
        super().start()
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r, self.lora_alpha, self.scaling, self.specs = {}, {}, {}, {}

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Add an adapter; its factors start as ``init_lora_weights`` says, drawn as PEFT draws them."""
        from rankfold.lora.starts import start_factors

        name = spec.name
        self.r[name], self.lora_alpha[name], self.scaling[name] = spec.rank, spec.alpha, spec.scale
        self.specs[name] = spec
        self.make_factors(spec)
        dropout = spec.config.lora_dropout
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        start_factors(self, spec)
        self.settle_factors(spec)

    def make_factors(self, spec: AdapterSpec) -> None:
        """Put fresh modules for ``spec.name`` into ``lora_A`` and ``lora_B``, in PEFT's order of draws."""
        raise NotImplementedError

    def delta(self, name: str) -> Tensor:
        """The change of the base weight by one adapter, in the weight's shape, at least float32.

        Raises MergeError where the update is no change of the weight."""
        raise NotImplementedError

    def adapter_names(self) -> Collection[str]:
        return self.r

    def delete_adapter(self, name: str) -> None:
        for holder in (self.lora_A, self.lora_B, self.lora_dropout):
            if name in holder:
                del holder[name]
        for values in (self.r, self.lora_alpha, self.scaling, self.specs):
            cast(dict[str, Any], values).pop(name, None)
        self.set_adapters([active for active in self._active if active != name])

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A (rank, in) and lora_B (out, rank) of one adapter."""
        return cast(nn.Parameter, self.lora_A[name].weight), cast(nn.Parameter, self.lora_B[name].weight)

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.r:
            return {}
        tensors = dict(zip(("lora_A.weight", "lora_B.weight"), self.factors(name), strict=True))
        bias = getattr(self.lora_B[name], "bias", None) if name in self.lora_B else None
        return tensors | ({} if bias is None else {"lora_B.bias": bias})

    def base_weight(self) -> Tensor:
        """The base weight as numbers, in the shape of ``delta``."""
        return cast(Tensor, self.weight)

    def changed_weight(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` (the base's, at least float32) with one adapter in it."""
        return weight + self.delta(name)

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        base = wide(self.base_weight().detach())
        total, values = base, {}
        for name in names:
            total = total + (self.changed_weight(name, base) - base if len(names) > 1 else 0)
        if len(names) == 1:
            total = self.changed_weight(next(iter(names)), base)
        values["weight"] = cast_merged(total, self.merged_like())
        bias = self._merged_bias(names)
        return values if bias is None else values | {"bias": bias}

    def merged_like(self) -> Tensor:
        """A tensor of the dtype that a merged weight is stored in."""
        return cast(Tensor, self.weight)

    def _merged_bias(self, names: Collection[str]) -> Tensor | None:
        shifts = {n: b for n in names if (b := getattr(self.lora_B[n], "bias", None)) is not None}
        if not shifts:
            return None
        bias = cast(Tensor | None, self.bias)
        if bias is None:
            raise MergeError(
                f"lora_bias adds a bias, and this {self.plain_class.__name__} has none to merge it into"
            )
        total = wide(bias) + sum(self.scaling[n] * wide(shift) for n, shift in shifts.items())
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
            data = parameter.data.to(home.device)
            if home.dtype.is_floating_point and data.dtype != home.dtype:
                data = data.to(home.dtype)
            if spec.widen and data.dtype in HALF_DTYPES:
                data = data.float()
            parameter.data = data

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


def linear_factor(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """``nn.Linear(in_features, out_features, bias)`` with the same random draws, in a fifth of the time."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    weight = torch.empty(out_features, in_features)
    draw_kaiming(weight)
    layer.weight = nn.Parameter(weight)
    layer.bias = None  # type: ignore[assignment]
    if bias:
        bound = 1 / math.sqrt(in_features)
        layer.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
    return layer


def draw_kaiming(weight: Tensor) -> None:
    """``nn.init.kaiming_uniform_(weight, a=sqrt(5))`` of a 2d weight, bit for bit."""
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(weight.shape[1]))
    with torch.no_grad():
        weight.uniform_(-bound, bound)
