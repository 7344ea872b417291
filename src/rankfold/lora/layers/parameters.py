"""LoRA on parameters (``target_parameters``): experts of a mixture, or any matrix a module computes with.

The module that owns the parameter is adapted in place.  Reading the parameter as an attribute
(``experts.gate_up_proj``) gives the base plus the applied updates, so whatever the module's own forward
does with it is done with the adapted one; ``parameters()`` and ``state_dict()`` hold the base.  Within one
call of ``forward`` the sum is made once a parameter, and dropped at its end.

The state dict gains ``<module>.lora_parameters.<parameter>.lora_A.<adapter>.weight`` and ``...lora_B...``,
of E experts (E * rank, in) and (out, rank * E), as PEFT stacks them.  A file has no room for the
parameter's name: PEFT nests one wrapper in another and calls the factors of the last registered parameter
``<module>.lora_A.weight``, of the one before ``<module>.base_layer.lora_A.weight``, and so on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rankfold.errors import MergeError
from rankfold.kernels.experts import MATRIX, Update, add_expert_updates, expert_delta
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec, cast_merged, mixed_class, upcast
from rankfold.lora.layers.factors import LoraLayer, linear_factor
from rankfold.lora.layers.registry import adapt, become

# By owner (its id) and parameter, the sums made in the calls of forward that are running in this thread.
Sums = dict[tuple[str, bool, bool], Tensor]
_running: ContextVar[Mapping[int, Sums]] = ContextVar("running", default=MappingProxyType({}))


class ParameterFactors(LoraLayer):
    """The adapters of one parameter; a part of the ``ParameterAdapters`` that owns the parameter."""

    holder: dict[str, nn.Parameter]
    key: str
    shape: torch.Size
    transposed: bool

    def __init__(self, owner: nn.Module, name: str) -> None:
        nn.Module.__init__(self)
        self.start()
        value = base_value(owner, name)
        home, key = cast(dict[str, nn.Parameter], owner._parameters), name
        if name not in home:  # parametrised
            home = cast(Any, owner).parametrizations[name]._parameters
            key = next(iter(home))
        # The dictionary, not the owner: a reference in both directions would keep a deleted model in
        # memory.  Not the parameter: a conversion of the model may exchange it.
        self.__dict__.update(holder=home, key=key, shape=value.shape)
        # Some experts are stored as (in, out); the attribute is transformers' word for that.
        transposed = value.dim() > MATRIX and bool(getattr(owner, "is_transposed", False))
        self.__dict__["transposed"] = transposed

    @property
    def parameter_name(self) -> str:
        return self.key

    @property
    def experts(self) -> int:
        return 1 if len(self.shape) == MATRIX else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[-2]

    def make_factors(self, spec: AdapterSpec) -> None:
        lora_a = linear_factor(self.in_features, spec.rank * self.experts)
        lora_b = linear_factor(spec.rank * self.experts, self.out_features)
        self.lora_A[spec.name], self.lora_B[spec.name] = lora_a, lora_b

    def merged_like(self) -> Tensor:
        return self.holder[self.key]

    def base_weight(self) -> Tensor:
        return self.holder[self.key]

    def delta(self, name: str) -> Tensor:
        return expert_delta(self._updates([name]), self.shape, transposed=self.transposed)

    def added_to(self, weight: Tensor, names: Collection[str]) -> Tensor:
        """``weight`` plus the updates of ``names``, in its dtype."""
        return add_expert_updates(weight, self._updates(names), transposed=self.transposed)

    def _updates(self, names: Collection[str]) -> list[Update]:
        return [(*self.factors(name), self.scaling[name]) for name in names]


class ParameterAdapters(AdapterLayer):
    """A module of any class whose targeted parameters carry adapters.  See the module's docstring."""

    added: ClassVar[tuple[str, ...]] = ("lora_parameters", *AdapterLayer.added)
    # The parameters that this class has a property for.
    parameter_names: ClassVar[frozenset[str]] = frozenset()

    lora_parameters: nn.ModuleDict

    def start(self) -> None:
        super().start()
        self.lora_parameters = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler sees by itself that two sums are the same, and cannot follow a ContextVar.
        if torch.compiler.is_compiling() or not self.applied or id(self) in _running.get():
            return super().forward(*args, **kwargs)
        before = _running.set({**_running.get(), id(self): {}})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.reset(before)

    def effective(self, name: str) -> Tensor:
        """The parameter as the module computes with it: the base plus the applied updates."""
        base, part = base_value(self, name), self.parameter_factors().get(name)
        if part is None or not part.applied:
            return base
        sums = None if torch.compiler.is_compiling() else _running.get().get(id(self))
        if sums is None:
            return part.added_to(base, part.applied)
        key = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in sums:
            sums[key] = part.added_to(base, part.applied)
        return sums[key]

    def parameter_factors(self) -> Mapping[str, ParameterFactors]:
        """The factors by parameter name, in the order in which PEFT nests its wrappers."""
        # Not through the ModuleDict's own methods: a parameter may be called "keys" or "values".
        return cast(dict[str, ParameterFactors], self.lora_parameters._modules)

    def _get_name(self) -> str:
        return "lora.ParamWrapper"

    @property
    def outermost(self) -> ParameterFactors:
        """The factors of the parameter whose wrapper is outermost in PEFT."""
        return list(self.parameter_factors().values())[-1]

    @property
    def lora_A(self) -> nn.ModuleDict:
        return self.outermost.lora_A

    @property
    def lora_B(self) -> nn.ModuleDict:
        return self.outermost.lora_B

    @property
    def scaling(self) -> dict[str, float]:
        return self.outermost.scaling

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return ", ".join(([own] if own else []) + [f"parameter_name={n!r}" for n in self.parameter_factors()])

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        return ["its parameters carry adapters (target_parameters); one layer cannot have both kinds"]

    def add_adapter(self, spec: AdapterSpec) -> None:
        """Add an adapter to the parameter that ends ``spec.target``."""
        name = spec.target.rpartition(".")[2]
        if name not in self.parameter_factors():
            self.lora_parameters._modules[name] = ParameterFactors(self, name)
            self._sort()
        self.parameter_factors()[name].add_adapter(spec)

    def drop(self, name: str) -> None:
        for parameter, part in list(self.parameter_factors().items()):
            if name in part.r:
                part.delete_adapter(name)
            if not part.r:
                del self.lora_parameters._modules[parameter]

    @classmethod
    def mixing(cls, kind: type[nn.Module]) -> tuple[Any, ...]:
        return mixed_parameters, cls.parameter_names, kind

    def adapter_names(self) -> Collection[str]:
        return {name: None for part in self.parameter_factors().values() for name in part.r}

    def _sort(self) -> None:
        """Bring the factors into the order in which PEFT nests its wrappers, the innermost first."""
        parts = self.lora_parameters._modules
        for name in sorted(parts) if is_parametrized(self) else self._parameters:
            if name in parts:
                parts[name] = parts.pop(name)

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {
            "base_layer." * depth + key: tensor
            for depth, part in enumerate(reversed(self._parts_of(name)))
            for key, tensor in part.adapter_tensors(name).items()
        }

    def file_depth(self, name: str) -> int:
        return len(self._parts_of(name))

    def _parts_of(self, name: str) -> list[ParameterFactors]:
        return [part for part in self.parameter_factors().values() if name in part.r]

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        values = {}
        for parameter, part in self.parameter_factors().items():
            carried = [name for name in names if name in part.r]
            if carried and parameter not in self._parameters:
                raise MergeError(
                    f"{parameter} is parametrised, so there is no weight to merge into; "
                    "make it an ordinary parameter first (torch's remove_parametrizations)"
                )
            if carried:
                base = part.base_weight().detach()
                values[parameter] = cast_merged(part.added_to(upcast(base), carried), base, carried)
        return values

    def refresh(self) -> None:
        super().refresh()
        for part in self.parameter_factors().values():
            state = {"_active": self._active, "_disabled": self._disabled}
            part.__dict__.update(state, merged_adapters=self.merged_adapters)
            part.refresh()

    def set_scale(self, name: str, factor: float) -> None:
        """Set the scale of one adapter to ``factor`` times what its config says."""
        for part in self.parameter_factors().values():
            part.set_scale(name, factor)

    def scale_layer(self, factor: float) -> None:
        """Multiply the scale of the active adapters by ``factor``."""
        for part in self.parameter_factors().values():
            part.scale_layer(factor)

    def unscale_layer(self, factor: float | None = None) -> None:
        """Divide the scale of the active adapters by ``factor``; None sets it back to the config's."""
        for part in self.parameter_factors().values():
            part.unscale_layer(factor)


def base_value(owner: nn.Module, name: str) -> Tensor:
    """A parameter of ``owner`` without the updates of adapters; through its parametrisation if it has one."""
    if name in owner._parameters:
        return cast(Tensor, owner._parameters[name])
    plain = owner.plain_class if isinstance(owner, AdapterLayer) else type(owner)
    return cast(Tensor, getattr(plain, name).__get__(owner))


@cache
def parameters_class(names: frozenset[str]) -> type[ParameterAdapters]:
    """The subclass of ``ParameterAdapters`` in which ``names`` are read through ``effective``."""
    members = {name: _effective(name) for name in names} | {"parameter_names": names, "__module__": __name__}
    return cast(type[ParameterAdapters], type("ParameterAdapters", (ParameterAdapters,), members))


def mixed_parameters(names: frozenset[str], kind: type[nn.Module]) -> type[AdapterLayer]:
    """The class of a ``kind`` whose parameters ``names`` carry adapters."""
    return mixed_class(parameters_class(names), kind)


def _effective(name: str) -> property:
    def value(owner: ParameterAdapters) -> Tensor:
        try:
            return owner.effective(name)
        except AttributeError as error:
            # Python would ask nn.Module's __getattr__ next, which answers with the base.
            raise RuntimeError(f"the adapted parameter {name} cannot be worked out: {error}") from error

    return property(value)


def adapt_parameter(module: nn.Module, name: str) -> ParameterAdapters:
    """Make ``module`` one whose parameter ``name`` can carry adapters, in place."""
    if isinstance(module, ParameterAdapters):
        kind = parameters_class(module.parameter_names | {name})
        become(module, mixed_class(kind, module.plain_class))
        return module
    return cast(ParameterAdapters, adapt(module, parameters_class(frozenset({name}))))
