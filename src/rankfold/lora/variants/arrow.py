"""Arrow: each token goes through the adapters whose strongest direction is nearest to it.

The directions are the largest right singular vectors of the updates; Ostapenko et al. 2024, arXiv
2405.11157.  With general knowledge subtraction the mean factors of general adapters are taken off each
expert's; Bagherifard et al. 2025.  PEFT takes them off the adapters themselves, for good; here they stay as
they are."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.lora.algebra.factor_svd import svd_of_product
from rankfold.lora.config.variant_configs import ArrowConfig
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.variants.variant import Variant

HELD = "lora_arrow"
GENERAL = re.compile("gks_[0-9]+")  # PEFT's names for general adapters


class ArrowRouter(nn.Module):
    """What an Arrow adapter keeps of one layer: the experts' directions, (experts, in), while their factors
    stay what they were."""

    def __init__(self, config: ArrowConfig, own: str) -> None:
        super().__init__()
        self.config, self.own = config, own
        self._known: tuple[Any, ...] | None = None
        self._directions: Tensor | None = None

    def experts(self, layer: Any) -> list[str]:
        """The adapters to choose from: all but routers and general ones."""
        return [n for n in layer.r if n not in layer.lora_arrow and not GENERAL.fullmatch(n)]

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """What is added for ``x`` (..., in): (..., out), the sum of the chosen experts' updates."""
        names = self.experts(layer)
        lora_a, lora_b = self._factors(layer, names)
        tokens = x.reshape(-1, x.shape[-1]).to(lora_a.dtype)
        likeness = (tokens @ self.directions(layer, names, lora_a, lora_b).T).abs()
        best, chosen = likeness.topk(min(self.config.top_k, len(names)))
        weights = torch.softmax(best / self.config.router_temperature, dim=1)
        shares = torch.zeros_like(likeness).scatter(1, chosen, weights)
        scales = torch.tensor([layer.scaling[name] for name in names]).to(tokens)
        narrow = (tokens @ lora_a.flatten(0, 1).T).view(len(tokens), *lora_a.shape[:2])
        narrow = narrow * (shares * scales)[:, :, None]
        return (narrow.flatten(1) @ lora_b.mT.flatten(0, 1)).view(*x.shape[:-1], -1)

    def _factors(self, layer: Any, names: list[str]) -> tuple[Tensor, Tensor]:
        """A (experts, rank, in) and B (experts, out, rank)."""
        stacked = [torch.stack(side) for side in zip(*map(layer.factors, names), strict=True)]
        general = self.config.gks_adapter_names if self.config.use_gks else None
        if general:
            shared = zip(*map(layer.factors, general), strict=True)
            stacked = [own - torch.stack(side).mean(0) for own, side in zip(stacked, shared, strict=True)]
        return stacked[0], stacked[1]

    @torch.no_grad()
    def directions(self, layer: Any, names: list[str], lora_a: Tensor, lora_b: Tensor) -> Tensor:
        every = [factor for name in layer.r if name != self.own for factor in layer.factors(name)]
        known = (*names, *((id(factor), factor._version) for factor in every))
        if self._directions is None or known != self._known:
            found = [svd_of_product(b, a).V[:, 0] for b, a in zip(lora_b, lora_a, strict=True)]
            self._directions = torch.stack(found).to(lora_a)
            self._known = known
        return self._directions


def _start(layer: Any, spec: AdapterSpec) -> None:
    layer.hold(HELD, spec.name, ArrowRouter(cast(ArrowConfig, spec.config.arrow_config), spec.name))


def _update(layer: Any, name: str, x: Tensor, out: Tensor) -> Tensor:
    total: Tensor = out + layer.dropped(name, layer.lora_arrow[name](layer, x)).to(out.dtype)
    return total


ARROW = Variant(
    _start, update=_update, cannot_merge="Cannot merge an active Arrow router adapter. Remove it first."
)
