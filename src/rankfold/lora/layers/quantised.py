"""LoRA for weights that a library keeps in 8 or 4 bits: bitsandbytes' linear layers, torchao's tensors.

A merged weight does not fit such a layer: rounded to its few bits again it misses a part of the update, which
is told.  After ``dequantise`` merging is exact.

bitsandbytes is looked up where it is used only; a layer of its own classes is there to prove it loaded."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rankfold.compat import unpack_four_bit
from rankfold.errors import MergeError
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec, cast_merged
from rankfold.lora.layers.linear import LinearUpdates, LoraLinear, is_torchao
from rankfold.lora.layers.registry import become, register_layer
from rankfold.lora.starts.parts import needs_weight

EIGHT_BIT = "bitsandbytes.nn.modules.Linear8bitLt"
FOUR_BIT = "bitsandbytes.nn.modules.Linear4bit"
# What the two layers hold besides a Linear's own attributes.
EXTRAS = (
    *("state", "index", "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage"),
    "support_avx512bf16_for_cpu",
)


class QuantisedUpdates(LinearUpdates):
    """The low-rank updates of a linear layer with a quantised weight.

    The base part is the layer's own forward, the update is computed in the factors' dtype, and the sum has
    the dtype of the base part.  It is a tensor of its own: bitsandbytes' output may be a view.
    DoRA takes its norms from the dequantised weight, which it makes in every call, as PEFT does."""

    added: ClassVar[tuple[str, ...]] = ("update_missed", *LinearUpdates.added)

    @classmethod
    def problems(cls, layer: nn.Module, spec: AdapterSpec) -> list[str]:
        found = super().problems(layer, spec)
        weight = cast(Tensor, layer.weight)
        if getattr(weight, "quant_state", None) is None and weight.dtype != torch.int8:
            found.append('its weight is not quantised yet; model.to("cpu") or another device does that')
        if needs_weight(layer, spec.config):
            found.append(
                "its start changes the base weight, and this one is quantised; dequantise(model) first"
            )
        return found

    def updated(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        if torch.is_autocast_enabled(out.device.type):  # it would take the sum to half precision, too
            update = super().updated(name, x, torch.zeros_like(out))
            return out + update.to(out.dtype)
        return super().updated(name, x, out)

    def base_weight(self) -> Tensor:
        return dequantised(self)

    def merged_like(self) -> Tensor:
        # The dtype of the storage says nothing about the numbers, even if it is one of floats.
        return torch.empty(0, dtype=torch.uint8, device=cast(Tensor, self._parameters["weight"]).device)

    def requantised(self, total: Tensor, names: Collection[str]) -> nn.Parameter:
        """``total`` in the layer's bits, rounded with the parameters of the weight that it has now.

        Raises MergeError if ``total`` is not finite in the dtype that the library rounds from."""
        raise MergeError(
            f"nothing says how a {self.plain_class.__name__} is rounded; give {type(self).__name__} a "
            "requantised(), or call dequantise(model) first"
        )

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        return self.with_bias(names, self.requantised(self.merged_weight(names), names))

    def _missed(self, names: Collection[str], weight: Tensor) -> float:
        """How far ``weight``, merged and rounded, is from the exact sum, as a share of the update."""
        total = self.merged_weight(names)
        wanted = float(torch.linalg.vector_norm(total - self.base_weight()))
        error = float(torch.linalg.vector_norm(dequantised(self, weight) - total))
        return error / wanted if wanted else 0.0

    @torch.no_grad()
    def store_merged(
        self,
        names: Collection[str],
        values: Mapping[str, Tensor],
        *,
        keep: bool,
        shared: Collection[int] = (),
    ) -> None:
        original = self.whole_weight()
        self.__dict__["update_missed"] = self._missed(names, values["weight"])
        super().store_merged(names, values, keep=keep, shared=shared)
        if keep:
            self._originals["weight"] = original

    def whole_weight(self) -> nn.Parameter:
        """The weight with everything that belongs to it, fit to be put aside and back."""
        return cast(nn.Parameter, self._parameters["weight"])

    def store(self, key: str, value: Tensor) -> None:
        if key != "weight":
            super().store(key, value)
            return
        home = cast(Tensor, self._parameters["weight"]).device
        self._parameters["weight"] = cast(nn.Parameter, value if value.device == home else value.to(home))


class LoraLinear8bitLt(QuantisedUpdates):
    """bitsandbytes' ``Linear8bitLt`` (Dettmers et al. 2022, arXiv 2208.07339) with its updates."""

    def requantised(self, total: Tensor, names: Collection[str]) -> nn.Parameter:
        old = cast(Any, self._parameters["weight"])
        weight = cast_merged(total, torch.empty(0, dtype=torch.float16), names).cpu()
        fresh = type(old)(weight, requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        return cast(nn.Parameter, fresh.to(old.device))

    def whole_weight(self) -> nn.Parameter:
        weight, state = cast(Any, self._parameters["weight"]), cast(Any, self.state)
        if state.SCB is not None:  # the first forward moved the scales there
            weight.CB, weight.SCB = weight.data, state.SCB
        return cast(nn.Parameter, weight)

    def store(self, key: str, value: Tensor) -> None:
        super().store(key, value)
        if key == "weight":
            cast(Any, self.state).reset_grads()  # the next forward takes the scales from the weight


class LoraLinear4bit(QuantisedUpdates):
    """bitsandbytes' ``Linear4bit`` (Dettmers et al. 2023, arXiv 2305.14314) with its updates.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weight in the first call without gradients, for
    good: later calls have no gradient, and the scales are rounded to bfloat16.  An adapter is trained after
    an evaluation, so an adapted layer is kept from that, and one that was repacked before is unpacked."""

    support_avx512bf16_for_cpu = property(lambda self: False)  # stands before the attribute of the object

    def start(self) -> None:
        super().start()
        unpack_four_bit(cast(Any, self._parameters["weight"]))

    def requantised(self, total: Tensor, names: Collection[str]) -> nn.Parameter:
        old = cast(Any, self._parameters["weight"])
        weight = cast_merged(total, torch.empty(0, dtype=old.quant_state.dtype), names)
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        fresh = type(old)(weight, requires_grad=False, **{name: getattr(old, name) for name in names})
        return cast(nn.Parameter, fresh.to(old.device))

    def store(self, key: str, value: Tensor) -> None:
        super().store(key, value)
        if key == "weight":
            self.quant_state = cast(Any, self._parameters["weight"]).quant_state


def dequantised(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a quantised layer, or another that it could hold, as numbers: (out, in), float32.

    They are what the layer computes with, up to the rounding to its compute dtype."""
    held = cast(Any, layer.weight if weight is None else weight)
    if is_torchao(held):
        return cast(Tensor, held.dequantize()).float()
    library = importlib.import_module("bitsandbytes.functional")
    if hasattr(held, "quant_state"):
        unpack_four_bit(held)
        state = copy.copy(held.quant_state)
        state.dtype = torch.float32  # else the numbers would be rounded to the dtype of long ago
        return cast(Tensor, library.dequantize_4bit(held.data, state))
    scales = held.SCB if held.SCB is not None else cast(Any, layer.state).SCB
    return cast(Tensor, library.int8_vectorwise_dequant(held.data, scales))


def is_quantised(layer: nn.Module) -> bool:
    """Whether ``layer`` holds its weight in a form that ``to_float`` undoes."""
    return _is_bitsandbytes(layer) or (isinstance(layer, nn.Linear) and is_torchao(layer.weight))


def _is_bitsandbytes(layer: nn.Module) -> bool:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__}
    return not names.isdisjoint((EIGHT_BIT, FOUR_BIT))


@torch.no_grad()
def to_float(layer: nn.Linear, dtype: torch.dtype) -> None:
    """Turn a quantised layer, adapted or not, into the ``nn.Linear`` that computes the same, in place.

    Raises MergeError while an adapter is merged into it."""
    if isinstance(layer, AdapterLayer) and layer.merged:
        raise MergeError(f"{layer.merged_adapters} are merged into it; unmerge_adapter() first")
    weight = dequantised(layer).to(dtype)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    if not _is_bitsandbytes(layer):
        return
    for name in ("update_missed", *EXTRAS):
        layer.__dict__.pop(name, None)
    if isinstance(layer, QuantisedUpdates):
        become(layer, LoraLinear)
        layer.refresh()
    else:
        become(layer, nn.Linear)


register_layer(EIGHT_BIT, LoraLinear8bitLt)
register_layer(FOUR_BIT, LoraLinear4bit)
