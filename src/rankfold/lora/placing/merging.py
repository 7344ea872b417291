"""Merging adapters into the base weights, all layers or none, and taking them out to the bit."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from rankfold.errors import MergeError, bullet_list
from rankfold.lora.layers.base import AdapterLayer, adapter_layers, restore


@torch.no_grad()
def merge(model: nn.Module, names: Collection[str], *, keep: bool = True) -> None:
    """Merge ``names``; with ``keep`` the original weights stay in memory for ``unmerge``.

    The merged values are worked out twice, once to check every layer and once to store them, rather
    than held for the whole model at a time.
    Raises MergeError naming every layer that cannot be merged; the model is then as it was."""
    for layer in _check(model, names).values():
        carried = _carried(layer, names)
        layer.merge(carried, _values(layer, carried), keep=keep)


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its original bits back, last merged first."""
    for _, layer in reversed(list(adapter_layers(model))):
        if layer.merged:
            layer.unmerge()


def merge_and_restore(model: nn.Module, names: Collection[str]) -> None:
    """Fold ``names`` into the weights for good and turn all adapter layers back into plain ones.

    Raises MergeError naming every layer that cannot be merged; the model is then as it was."""
    merge(model, names, keep=False)
    for _, layer in list(adapter_layers(model)):
        restore(layer)


def _check(model: nn.Module, names: Collection[str]) -> dict[str, AdapterLayer]:
    """Every layer that carries one of ``names``, all of them found fit to be merged."""
    layers = {p: layer for p, layer in adapter_layers(model) if set(names) & set(layer.adapter_names())}
    problems = [f"{path} is merged already; unmerge first" for path, layer in layers.items() if layer.merged]
    problems += _shared_weights(model, layers)
    for path, layer in layers.items():
        try:
            _values(layer, _carried(layer, names))
        except MergeError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise MergeError(bullet_list("nothing was merged:", problems))
    return layers


def _carried(layer: AdapterLayer, names: Collection[str]) -> list[str]:
    return [name for name in names if name in layer.adapter_names()]


def _values(layer: AdapterLayer, carried: list[str]) -> dict[str, Tensor]:
    """What ``layer`` stores when ``carried`` are merged; a follower's weight is its leader's to change."""
    if clash := layer.clash(carried):
        raise MergeError(clash)
    return {} if layer.leader is not None else layer.merged_values(carried)


def _shared_weights(model: nn.Module, layers: dict[str, AdapterLayer]) -> list[str]:
    """A problem for each weight to be merged that some other module uses too."""
    owners = {
        id(parameter): (f"{path}.{key}", layer)
        for path, layer in layers.items()
        for key, parameter in layer.base_parameters()
        if layer.leader is None
    }
    problems = []
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}"  # of a part of a module that is trained whole, too
            owned, owner = owners.get(id(parameter), (name, module))
            follows = isinstance(module, AdapterLayer) and module.leader is owner
            if owned != name and not follows:
                problems.append(f"{owned} is tied to {name}, which merging would change too")
    return problems
