"""One adapter made of several: PEFT's ``add_weighted_adapter``.

"linear", "cat" and, cut to a rank, "svd" are the weighted sum of the updates; "ties" and the others act on
the updates in a basis that they share (``Combining.of_products``), and with "_svd" are cut to a rank.  None
of them makes an update itself.  PEFT combines A with A and B with B in "linear" and those without "svd", so
that products of one adapter's A with another's B come into it: "linear_by_factor", "ties_by_factor" and so
on here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankfold.errors import ConfigError
from rankfold.lora.algebra.combining import METHODS, Combining
from rankfold.lora.algebra.factor_svd import FactorSVD, svd_of_product
from rankfold.lora.config.variant_configs import not_plain
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.parameters import ParameterAdapters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.layers.saved import SavedModule

if TYPE_CHECKING:
    from rankfold.peft_surface.tuner import LoraModel

SVD, BY_FACTOR = "_svd", "_by_factor"
KINDS = (
    *("svd", "cat", *METHODS),
    *(f"{method}{SVD}" for method in METHODS if method != "linear"),
    *(f"{method}{BY_FACTOR}" for method in METHODS),
)


@dataclass(frozen=True)
class Combination:
    """How updates become one; the words of PEFT's call.

    ``density``: the share of values that the pruning methods keep.  ``svd_clamp``: the quantile at which the
    factors of "svd" are cut off."""

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True  # the result does not depend on it
    svd_driver: str | None = None  # nor on this
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def combining(self) -> Combining:
        plain = self.kind.removesuffix(SVD).removesuffix(BY_FACTOR)
        method = "linear" if plain in ("svd", "cat") else plain
        return Combining(method, self.density, self.majority_sign_method)


def add_weighted_adapter(
    tuner: LoraModel, adapters: Sequence[str], weights: Sequence[float], name: str, how: Combination
) -> None:
    """Put the adapter ``name``, ``sum(weights[i] * adapters[i])`` combined as ``how`` says, beside the
    others.

    Raises ConfigError for adapters that cannot be combined so; nothing is changed then."""
    if name in tuner.peft_config:
        raise ConfigError(f"there is an adapter {name!r} already; delete_adapter it, or choose another name")
    how, rank = _checked(tuner, adapters, weights, how)
    first = tuner.peft_config[adapters[0]]
    config = dataclasses.replace(
        first,
        r=rank,
        lora_alpha=math.sqrt(rank) if first.use_rslora else rank,
        target_modules=_all_targets(tuner, adapters),
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        use_dora=False,
    )
    tuner.add(name, config)
    with torch.no_grad():
        for _, layer in adapter_layers(tuner.model):
            if isinstance(layer, LoraLayer) and name in layer.r:
                _fill(
                    layer,
                    name,
                    [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.r],
                    how,
                )
    tuner.set_requires_grad(name, False)


def _checked(
    tuner: LoraModel, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> tuple[Combination, int]:
    """How the adapters are combined, and the rank of the result."""
    configs = [tuner.peft_config[name] for name in adapters]
    kind, invocation = how.kind, configs[0].alora_invocation_tokens
    if len(adapters) == 1 and kind in KINDS:
        kind, how = "linear", dataclasses.replace(how, kind="linear")
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    kinds = {isinstance(config.target_modules, str) for config in configs}
    saved = [layer for _, layer in adapter_layers(tuner.model) if isinstance(layer, SavedModule)]
    twice = [layer for layer in saved if len({*adapters} & {*layer.adapter_names()}) > 1]
    faults = {
        f"Invalid combination_type: {how.kind!r} is none of {', '.join(KINDS)}": how.kind not in KINDS,
        f"there are {len(adapters)} adapters and {len(weights)} weights": len(weights) != len(adapters),
        "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
        f"dare_linear, got {ranks}; take 'cat', 'svd' or 'ties_svd'": kind.removesuffix(BY_FACTOR) in METHODS
        and len(set(ranks)) > 1,
        "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
        f"{len(twice)} such instance(s).": bool(twice),
        "add_weighted_adapter does not support targeting nn.Parameter": any(
            isinstance(layer, ParameterAdapters) for _, layer in adapter_layers(tuner.model)
        ),
        "all adapters should follow the same target modules type, either str or list/set": len(kinds) > 1,
        "an adapter with DoRA is no sum, and cannot be combined": any(c.use_dora for c in configs),
        "; ".join(text for config in configs for text in not_plain(config)): any(map(not_plain, configs))
        and not all(invocation and config.alora_invocation_tokens == invocation for config in configs),
        f"{kind} needs density, the share of values to keep": how.density is None
        and how.combining.method != "linear",
    }
    if problems := [text for text, holds in faults.items() if holds]:
        raise ConfigError(f"these adapters cannot be combined: {'; '.join(problems)}")
    if kind.endswith("svd"):
        return how, how.svd_rank or max(ranks)
    return how, ranks[0] if kind.endswith(BY_FACTOR) else sum(ranks)


def _all_targets(tuner: LoraModel, adapters: Sequence[str]) -> set[str] | str:
    wanted = [tuner.peft_config[name].target_modules for name in adapters]
    if all(isinstance(each, str) for each in wanted):
        return "|".join(f"({each})" for each in dict.fromkeys(wanted))
    return {name for each in wanted for name in each or ()}


def _fill(layer: LoraLayer, name: str, parts: list[tuple[str, float]], how: Combination) -> None:
    """Give the factors of ``name`` their values from those of ``parts``, names with weights."""
    if not parts:
        raise ConfigError(f"No matching LoRAs found for {layer.specs[name].target}")
    if how.kind.endswith(BY_FACTOR):
        found = _by_factor(layer, parts, how.combining)
    elif how.kind == "cat":
        found = _side_by_side(layer, parts)
    else:
        found = _nearest(_combined(layer, parts, how.combining), layer.r[name], how)
    lora_a, lora_b = layer.factors(name)
    rank = found[0].shape[0]
    lora_a[rank:], lora_b[:, rank:] = 0, 0
    lora_a[:rank] = found[0].reshape(-1, *lora_a.shape[1:])
    lora_b[:, :rank] = found[1].reshape(-1, rank, *lora_b.shape[2:])


def _by_factor(
    layer: LoraLayer, parts: list[tuple[str, float]], combining: Combining
) -> tuple[Tensor, Tensor]:
    shares = [w * layer.scaling[n] for n, w in parts]
    signed = [math.copysign(math.sqrt(abs(share)), share) for share in shares]
    return (
        combining.of([layer.factors(n)[0] for n, _ in parts], signed),
        combining.of([layer.factors(n)[1] for n, _ in parts], [abs(s) for s in signed]),
    )


def _side_by_side(layer: LoraLayer, parts: list[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    """Factors of the weighted sum, of the ranks' sum."""
    rows = torch.cat([layer.factors(n)[0] * (w * layer.scaling[n]) for n, w in parts])
    return rows, torch.cat([layer.factors(n)[1] for n, _ in parts], dim=1)


def _combined(layer: LoraLayer, parts: list[tuple[str, float]], combining: Combining) -> FactorSVD:
    """The singular values of the combined updates."""
    if combining.method == "linear":
        rows, columns = _side_by_side(layer, parts)
        return svd_of_product(columns.flatten(1), rows.flatten(1))
    pairs = [(layer.scaling[n] * b.flatten(1), a.flatten(1)) for n, _ in parts for a, b in [layer.factors(n)]]
    return combining.of_products(pairs, [w for _, w in parts])


def _nearest(svd: FactorSVD, rank: int, how: Combination) -> tuple[Tensor, Tensor]:
    """A (up to rank, in) and B (out, up to rank), whose product is the nearest of that rank."""
    lora_a, lora_b = svd.V[:, :rank].T, svd.U[:, :rank] * svd.S[:rank]
    if how.svd_clamp is None or not how.kind.endswith("svd"):
        return lora_a, lora_b
    limit = torch.quantile(torch.cat([lora_b.flatten(), lora_a.flatten()]), how.svd_clamp)
    return lora_a.clamp(-limit, limit), lora_b.clamp(-limit, limit)
