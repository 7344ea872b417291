"""Merging adapters into the base weights, all layers or none, and taking them out to the bit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import nn

from rankfold.errors import MergeError, RankfoldWarning, bullet_list
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.registry import adapter_layers, base_modules, restore


@torch.no_grad()
def merge(model: nn.Module, names: Collection[str], *, keep: bool = True) -> None:
    """Merge ``names`` beside what is merged already; with ``keep`` the original weights stay in memory for
    ``unmerge``.  A weight that other modules use too is untied first, so that only its own layer changes.

    The merged values are worked out twice, once to check every layer and once to store them, rather
    than held for the whole model at a time.
    Raises MergeError naming every layer that cannot be merged; the model is then as it was."""
    layers = {p: layer for p, layer in adapter_layers(model) if set(names) & {*layer.adapter_names()}}
    wanted = {path: _wanted(layer, names) for path, layer in layers.items()}
    _check(layers, wanted)
    shared = _shared_parameters(model)
    for path, layer in layers.items():
        layer.remerge(wanted[path], keep=keep, shared=shared)
    _tell_of_rounding({path: layer.update_missed for path, layer in layers.items() if layer.update_missed})


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its original bits back, last merged first."""
    unmerge_layers([layer for _, layer in adapter_layers(model)])


def unmerge_layers(layers: list[AdapterLayer]) -> None:
    for layer in reversed(layers):
        if layer.merged:
            layer.unmerge()


def merge_and_restore(model: nn.Module, names: Collection[str]) -> None:
    """Fold ``names`` into the weights for good and turn all adapter layers back into plain ones.

    Raises MergeError naming every layer that cannot be merged; the model is then as it was."""
    merge(model, names, keep=False)
    for _, layer in list(adapter_layers(model)):
        restore(layer)


def _wanted(layer: AdapterLayer, names: Collection[str]) -> list[str]:
    """What is merged into ``layer`` when ``names`` are, too."""
    carried = [name for name in names if name in layer.adapter_names()]
    return list(dict.fromkeys([*layer.merged_adapters, *carried]))


def _check(layers: Mapping[str, AdapterLayer], wanted: Mapping[str, list[str]]) -> None:
    """Raise MergeError naming every layer that cannot be merged."""
    problems = []
    for path, layer in layers.items():
        try:
            if clash := layer.clash(wanted[path]) or layer.cannot_stay_apart(wanted[path]):
                raise MergeError(clash)
            if layer.leader is None and not layer.merged:
                layer.merged_values(wanted[path])
        except MergeError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise MergeError(bullet_list("nothing was merged:", problems))


def _tell_of_rounding(missed: Mapping[str, float]) -> None:
    if missed:
        worst = max(missed, key=lambda path: missed[path])
        warnings.warn(
            f"{len(missed)} quantised layers were merged and rounded again (rounding errors), which misses "
            f"up to {missed[worst]:.0%} of the adapter's update ({worst}); dequantise(model) merges exactly",
            RankfoldWarning,
            stacklevel=5,
        )


def _shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules use, those apart that follow an adapter's layer."""
    uses: Counter[int] = Counter()
    for _, module in base_modules(model):
        if not (isinstance(module, AdapterLayer) and module.leader is not None):
            uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return {key for key, count in uses.items() if count > 1}
