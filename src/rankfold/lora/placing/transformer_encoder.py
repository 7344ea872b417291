"""``nn.TransformerEncoder`` around adapted layers.

In eval mode it packs a padded batch into a nested tensor if no weight of its first layer is trained under
grad mode, because then every layer takes the fast path.  With adapters the base weights are not trained,
and yet no adapted layer takes the fast path: under grad mode its attention raises an AssertionError."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.registry import base_modules


class WithoutGrad:
    """True where no gradient is kept: torch's own rule for an encoder that is being trained."""

    def __bool__(self) -> bool:
        return not torch.is_grad_enabled()


WITHOUT_GRAD = WithoutGrad()


def pack_without_grad(model: nn.Module) -> None:
    """Let encoders around adapted layers pack batches only where no gradient is kept; give those without
    adapted layers their own choice back."""
    for _, encoder in base_modules(model):
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        packs = vars(encoder).get("use_nested_tensor")
        adapted = any(isinstance(module, AdapterLayer) for module in encoder.modules())
        if packs is True and adapted:
            cast(Any, encoder).use_nested_tensor = WITHOUT_GRAD
        elif isinstance(packs, WithoutGrad) and not adapted:
            encoder.use_nested_tensor = True
