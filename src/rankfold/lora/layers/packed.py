"""LoRA for layers that hold their weight in few bytes (the room ``storage``).

The base part is the layer's own product with the expanded weight.  Nothing is merged into held bytes:
they are what will be run, and no sum fits them.  ``dequantise(model)`` first, and a merge is exact."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError
from rankfold.kernels.frozen import FrozenMatrix
from rankfold.lora.layers.embedding import LoraEmbedding
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.linear import FUSED_CLASSES, FusedUpdates, LoraLinear
from rankfold.lora.layers.registry import become, register_layer
from rankfold.storage.layers import HeldEmbedding, HeldLayer, HeldLinear, held_layers, release


class HeldUpdates(HeldLayer, LoraLayer):
    """The low-rank updates of a layer with a held weight.

    DoRA takes its norms from the expanded weight, which it makes in every call."""

    def base_weight(self) -> Tensor:
        return self.expanded_weight()

    def merged_like(self) -> Tensor:
        return self.numbers_like

    def merged_values(self, names: Collection[str]) -> dict[str, Tensor]:
        raise MergeError(
            f"its weight is held as {self.form.name}, which a merged one does not fit; "
            "dequantise(model) first for an exact merge"
        )


class LoraHeldLinear(HeldUpdates, FusedUpdates, HeldLinear):  # type: ignore[misc] # forward
    """``HeldLinear`` plus the low-rank updates of its active adapters."""

    plain_class = HeldLinear

    def fused_base(self) -> tuple[Tensor | FrozenMatrix, Tensor | None]:
        return self, self._parameters.get("bias")


class LoraHeldEmbedding(HeldUpdates, LoraEmbedding, HeldEmbedding):
    """``HeldEmbedding`` plus the low-rank updates of its active adapters."""

    plain_class = HeldEmbedding


# What a layer becomes when its weight is expanded for good.
EXPANDED: dict[type[nn.Module], type[nn.Module]] = {
    HeldLinear: nn.Linear,
    HeldEmbedding: nn.Embedding,
    LoraHeldLinear: LoraLinear,
    LoraHeldEmbedding: LoraEmbedding,
}


@torch.no_grad()
def expand_layers(layers: Iterable[HeldLayer], dtype: torch.dtype) -> None:
    """Turn held layers, adapted or not, into plain ones with the same numbers in ``dtype``, in place.

    Layers that shared their bytes share the numbers."""
    weights: dict[int, nn.Parameter] = {}
    for layer in layers:
        key, kind = id(layer.held), EXPANDED[type(layer)]
        if key not in weights:
            weights[key] = nn.Parameter(layer.expanded_weight(dtype), requires_grad=False)
        release(layer, weights[key])
        become(layer, kind)
        if isinstance(layer, LoraLayer):
            layer.refresh()


def numbers_not_shown(model: nn.Module) -> int:
    """How many more numbers the held and 4-bit weights of ``model`` are than bytes, shared ones once."""
    shapes = {id(layer.held): (layer.shape, layer.held.numel()) for layer in held_layers(model).values()}
    held = sum(rows * columns - size for (rows, columns), size in shapes.values())
    states = [
        (p, state) for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None
    ]
    return held + sum(int(math.prod(state.shape)) - parameter.numel() for parameter, state in states)


FUSED_CLASSES.add(LoraHeldLinear)
register_layer(HeldLinear, LoraHeldLinear)
register_layer(HeldEmbedding, LoraHeldEmbedding)
