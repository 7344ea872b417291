"""``LoraLayer``: an adapter layer whose adapters are pairs of low-rank factors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.lora.layers.base import HALF_DTYPES, AdapterSpec, cast_merged, upcast
from rankfold.lora.layers.carrying import MICA, carrying_problems
from rankfold.lora.layers.dora import MAGNITUDES, Magnitude, row_factors, row_norms
from rankfold.lora.layers.init import draw_kaiming, minor_directions, start_factors
from rankfold.lora.layers.residual_base import ResidualBase
from rankfold.lora.starts.parts import splits_base
from rankfold.lora.variants.table import HELD, variant_of
from rankfold.lora.variants.variant import Variant

# What PEFT's layer is called where it is not called after the plain layer.
PEFT_NAMES = {"Conv1D": "Linear", "NonDynamicallyQuantizableLinear": "Linear"}
NO_ADAPTERS = nn.ModuleDict()
NO_DROPOUT = nn.Identity()  # one for all layers: it holds nothing


def never_called(module: nn.Module, inputs: Any) -> None:
    pass


# The fast path of nn.TransformerEncoderLayer reads the weights and passes an adapter by, except where a
# module inside has a hook.  A ModuleDict is never called, so this one costs nothing.
NO_FAST_PATH = OrderedDict({0: never_called})


class LoraLayer(ResidualBase):
    """Adds ``lora_A.<adapter>.weight`` and ``lora_B.<adapter>.weight`` to the state dict.

    A layer type implements ``make_factors``, ``delta`` and ``forward``, in which each adapter in
    ``applied`` adds its update."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", MAGNITUDES, *HELD)
    other_param_names: ClassVar[tuple[str, ...]] = (
        *("lora_dropout", "r", "lora_alpha", "scaling", "specs", "use_dora", "lora_variant"),
    )
    added: ClassVar[tuple[str, ...]] = (*adapter_layer_names, *other_param_names, *ResidualBase.added)

    # Whether variants of the pair are supported.
    has_variants: ClassVar[bool] = False
    # Whether fresh factors start in the layer's own way, whatever init_lora_weights says.
    own_start: ClassVar[bool] = False

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    specs: dict[str, AdapterSpec]
    use_dora: dict[str, bool]
    lora_variant: dict[str, Variant]
    lora_dropout: nn.ModuleDict

    def start(self) -> None:
        super().start()
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lora_A.__dict__["_forward_pre_hooks"] = NO_FAST_PATH
        self.__dict__.update(r={}, lora_alpha={}, scaling={}, specs={}, use_dora={}, lora_variant={})

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        """As the base class says, for the start of ``spec``, its variant and DoRA."""
        return carrying_problems(cls, layer, spec)

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Add an adapter; its factors start as ``init_lora_weights`` says, drawn as PEFT draws them."""
        start = spec.config.init_lora_weights
        start = start is not False if self.own_start else start
        self.list_adapter(spec)
        self.make_factors(spec)
        splits = self.is_matrix and splits_base(self, spec.config)
        if start is not False and not splits:
            with torch.no_grad():
                self.start_factors(spec)
        self.settle_factors(spec)
        if splits:
            self.split_base(spec)
        if spec.config.init_lora_weights == MICA and not spec.without_memory:
            self._start_minor(spec)
        if spec.config.use_dora:
            self._start_magnitude(spec.name)
        if variant := variant_of(spec.config):
            self.lora_variant[spec.name] = variant[1]
            with torch.no_grad():
                variant[1].start(self, spec)

    def hold(self, holder: str, name: str, module: nn.Module) -> None:
        """Keep ``module`` for one adapter under ``holder``, one of ``adapter_layer_names``."""
        if holder not in self._modules:
            self._modules[holder] = nn.ModuleDict()
        cast(nn.ModuleDict, self._modules[holder])[name] = module

    def list_adapter(self, spec: AdapterSpec) -> None:
        """Note what ``spec`` says, and make its dropout."""
        name, dropout = spec.name, spec.config.lora_dropout
        self.r[name], self.lora_alpha[name], self.scaling[name] = spec.rank, spec.alpha, spec.scale
        self.specs[name], self.use_dora[name] = spec, spec.config.use_dora
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else NO_DROPOUT

    def make_factors(self, spec: AdapterSpec) -> None:
        """Put fresh modules for ``spec.name`` into ``lora_A`` and ``lora_B``, in PEFT's order of draws."""
        raise NotImplementedError

    def start_factors(self, spec: AdapterSpec) -> None:
        """The start of a base that stays as it is."""
        lora_a, lora_b = self.factors(spec.name)
        start_factors(lora_a, lora_b, spec.config.init_lora_weights, spec.rank)
        if (bias := self.factor_bias(spec.name)) is not None:
            bias.zero_()

    @torch.no_grad()
    def _start_minor(self, spec: AdapterSpec) -> None:
        weight = self.base_weight().detach()
        matrix = upcast(weight.movedim(cast(int, self.row_dim), 0))
        lora_a, lora_b = self.factors(spec.name)
        lora_a.zero_()
        lora_b.copy_(minor_directions(matrix, spec.rank))

    def frozen_tensors(self, name: str) -> list[Tensor]:
        """The tensors of one adapter that are never trained."""
        return [self.factors(name)[1]] if self.specs[name].config.init_lora_weights == MICA else []

    def set_requires_grad(self, adapter_names: str | Collection[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for tensor in self.frozen_tensors(name) if name in self.r else ():
                tensor.requires_grad_(False)

    def _start_magnitude(self, name: str) -> None:
        """Give one adapter the row norms of its changed weight as magnitudes, so that it changes nothing yet.

        Shape: (rows), or (1, rows, 1, ..) for a weight of more than two dimensions, as in PEFT.  They have
        the dtype of the factors; PEFT rounds them to the base's dtype first."""
        weight, lora_b = self.base_weight_for([name]), self.factors(name)[1]
        if lora_b.is_meta:
            norms = lora_b.new_empty(weight.shape[cast(int, self.row_dim)])
        else:
            norms = self.start_norms(name).to(lora_b.dtype)
        if weight.dim() > len(("rows", "columns")):
            norms = norms.view(1, -1, *[1] * (weight.dim() - 2))
        self.hold(MAGNITUDES, name, Magnitude(norms))

    def start_norms(self, name: str) -> Tensor:
        weight = self.base_weight_for([name])
        return row_norms(weight, cast(int, self.row_dim), self.factors(name), self.scaling[name])

    def delta(self, name: str) -> Tensor:
        """The change of the base weight by one adapter, in the weight's shape, at least float32.

        Raises MergeError where the update is no change of the weight."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``delta`` in the dtype of the factors, as in PEFT."""
        return self.delta(adapter).to(self.factors(adapter)[1].dtype)

    def adapter_names(self) -> Collection[str]:
        return self.r

    def drop(self, name: str) -> None:
        self.end_split_of(name)
        for key in (*self.adapter_layer_names, *self.other_param_names):
            holder: Any = self._modules.get(key, self.__dict__.get(key))
            if holder is not None and name in holder:
                del holder[name]

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A (rank, in) and lora_B (out, rank) of one adapter."""
        # The same as self.lora_A[name].weight, without torch's slow attribute lookup on each call.
        modules: dict[str, Any] = self._modules
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_a._parameters["weight"], lora_b._parameters["weight"]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) whose product, times the scale, is the update."""
        variant = self.lora_variant.get(name)
        return self.factors(name) if variant is None or variant.pair is None else variant.pair(self, name)

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.r:
            return {}
        lora_a, lora_b = self.factors(name)
        tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
        if (bias := self.factor_bias(name)) is not None:
            tensors["lora_B.bias"] = bias
        held = self.lora_variant[name].tensors(self, name) if name in self.lora_variant else {}
        return tensors | self.magnitude_tensors(name) | held

    def magnitude_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The magnitudes of one adapter by their key in PEFT's file; none if it is no DoRA adapter."""
        held = self.lora_magnitude_vector
        return {MAGNITUDES: held[name].weight} if name in held else {}

    def factor_bias(self, name: str) -> nn.Parameter | None:
        """The bias of one adapter's B, if it has one (``lora_bias``)."""
        modules: dict[str, Any] = self._modules
        return cast(nn.Parameter | None, modules["lora_B"]._modules[name]._parameters.get("bias"))

    def base_weight(self) -> Tensor:
        """The base weight as numbers, in the shape of ``delta``."""
        return cast(Tensor, self.weight)

    def row_factors(self, name: str, weight: Tensor | None = None) -> Tensor:
        """What DoRA multiplies each row of the changed weight by, (rows), at least float32."""
        weight = self.base_weight() if weight is None else weight
        norms = row_norms(weight, cast(int, self.row_dim), self.factors(name), self.scaling[name])
        return row_factors(self.lora_magnitude_vector[name].weight, norms)

    def changed_weight(self, name: str, weight: Tensor) -> Tensor:
        """``weight`` (the base's, at least float32) with one adapter in it."""
        changed = weight + self.delta(name)
        if name not in self.lora_magnitude_vector:
            return changed
        shape = [1] * weight.dim()
        shape[cast(int, self.row_dim)] = -1
        return self.row_factors(name, weight).view(shape) * changed

    def merged_weight(self, names: Collection[str]) -> Tensor:
        """The base weight with the adapters ``names`` in it, at least float32.

        Raises MergeError if one of them is no change of the weight."""
        for variant in (self.lora_variant.get(name) for name in names):
            if variant is not None and variant.cannot_merge:
                raise MergeError(variant.cannot_merge)
        # An adapter that stays apart may be the one whose start split the base weight.
        base = upcast(self.base_weight_for([*names, *self._active]).detach())
        changed = [self.changed_weight(name, base) for name in names]
        return changed[0] if len(changed) == 1 else sum((weight - base for weight in changed), base)

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return self.with_bias(names, cast_merged(self.merged_weight(names), self.merged_like(), names))

    def cannot_stay_apart(self, merged: Collection[str]) -> str | None:
        apart = [n for n in self._active if n in self.r and n not in merged and self.specs[n].config.use_dora]
        return (
            f"the DoRA adapters {apart} are active and need the base weight; merge them too"
            if apart
            else None
        )

    def with_bias(self, names: Collection[str], weight: Tensor) -> dict[str, Tensor]:
        """``weight`` as a merged value, beside the merged bias if there is one."""
        bias = self._merged_bias(names)
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def merged_like(self) -> Tensor:
        """A tensor of the dtype that a merged weight is stored in."""
        return cast(Tensor, self.weight)

    def _merged_bias(self, names: Collection[str]) -> Tensor | None:
        shifts = {n: b for n in names if (b := self.factor_bias(n)) is not None}
        if not shifts:
            return None
        bias = cast(Tensor | None, self.bias)
        if bias is None:
            raise MergeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: a "
                f"{self.plain_class.__name__} without one has no place for it"
            )
        total = upcast(bias) + sum(self.scaling[n] * upcast(shift) for n, shift in shifts.items())
        return cast_merged(total, bias, names)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of one adapter to ``scale`` times what its config says."""
        if adapter in self.specs:
            self.scaling[adapter] = scale * self.specs[adapter].scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by ``scale``."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters by ``scale``; None sets it back to the config's."""
        for name in self._active:
            if name in self.scaling:
                self.scaling[name] = self.specs[name].scale if scale is None else self.scaling[name] / scale

    def settle_factors(self, spec: AdapterSpec) -> None:
        """Move fresh factors to the device and dtype of the base, as PEFT does: through the base's dtype,
        and then to float32 where that is a half-precision one and ``spec.widen``."""
        like = self.merged_like()
        device = torch.device("meta") if spec.without_memory else like.device
        for parameter in self.adapter_tensors(spec.name).values():
            if parameter.dtype == like.dtype == torch.float32 and parameter.device == device:
                continue
            data = parameter.data.to(device)
            if like.dtype.is_floating_point and data.dtype != like.dtype:
                data = data.to(like.dtype)
            if spec.widen and data.dtype in HALF_DTYPES:
                data = data.float()
            if data.is_meta:
                torch.utils.swap_tensors(parameter, nn.Parameter(data))
            else:
                parameter.data = data

    def dropped(self, name: str, x: Tensor) -> Tensor:
        """``x`` after one adapter's dropout."""
        if self.training and self.specs[name].config.lora_dropout:
            return cast(Tensor, self.lora_dropout[name](x))
        return x

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        return {name: ("lora_B",) for name in self.r if self.frozen_tensors(name)}

    @property
    def lora_embedding_A(self) -> Any:
        return self._modules.get("lora_embedding_A", NO_ADAPTERS)

    @property
    def lora_embedding_B(self) -> Any:
        return self._modules.get("lora_embedding_B", NO_ADAPTERS)

    @property
    def lora_magnitude_vector(self) -> Any:
        return self._modules.get(MAGNITUDES, NO_ADAPTERS)

    def __getattr__(self, name: str) -> Any:
        """What no adapter of the layer holds is empty."""
        return NO_ADAPTERS if name in HELD and name not in self._modules else super().__getattr__(name)

    @property
    def peft_name(self) -> str:
        """What PEFT's layer is called."""
        plain = self.plain_class.__name__
        return f"lora.{PEFT_NAMES.get(plain, plain)}"

    def _get_name(self) -> str:
        return self.peft_name

    __repr__ = nn.Module.__repr__  # Conv1D of transformers has one of its own

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={self.r[name]} alpha={self.lora_alpha[name]:g} scale={self.scaling[name]:g}"
            for name in self.r
        )
        own = super().extra_repr()
        if "in_features" not in own:
            own = (
                f"{own}{', ' if own else ''}in_features={self.in_features}, out_features={self.out_features}"
            )
        return f"{own}, adapters=[{adapters}]"


def linear_factor(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """``nn.Linear(in_features, out_features, bias)`` with the same random draws, made faster."""
    layer = nn.Linear.__new__(nn.Linear)  # whose own start would be drawn and thrown away
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    weight = torch.empty(out_features, in_features)
    draw_kaiming(weight)
    layer._parameters.update(weight=nn.Parameter(weight), bias=None)
    if bias:
        bound = in_features**-0.5
        layer._parameters["bias"] = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
    return layer
