"""``layer_replication``: a deeper model made of the layers of a smaller one, which share their weights.

[[0, 4], [2, 5]] makes of five layers the seven 0 1 2 3 2 3 4.  Each is a layer of its own with adapters of
its own around the same base parameters (Kim et al. 2023, arXiv 2312.15166, without the further training)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from rankfold.errors import ConfigError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.registry import adapter_layers

# Under this name a model remembers what it was made of.
MARK = "_layer_replication"
# Where the layers are, within the innermost ``model`` or ``bert``, as in PEFT: Llama, Bert, Falcon; and in
# ``transformer``, where PEFT finds only the model without its head.
PLACES = ("layers", "encoder.layer", "h")


@dataclass
class Replication:
    """What ``replicate`` did to a model, and what it takes to undo it."""

    ranges: list[list[int]]
    owner: nn.Module
    name: str
    layers: nn.ModuleList
    settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def replicated(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Give ``model`` the layers of ``config.layer_replication``, and take them back if the block raises.

    A model that has them already stays as it is.  Raises ConfigError if it has others, carries adapters
    already, has no layers that can be told, or fewer than are asked for."""
    ranges = [list(pair) for pair in config.layer_replication or ()]
    known = replication_of(model)
    if known is not None and ranges and known.ranges != ranges:
        raise ConfigError(f"layer_replication: the model's layers are replicated as {known.ranges} already")
    new = bool(ranges) and known is None
    if new and any(True for _ in adapter_layers(model)):
        raise ConfigError("layer_replication: the model carries adapters already; it is for the first one")
    if new:
        replicate(model, ranges)
    try:
        yield
    except BaseException:
        if new:
            end_replication(model)
        raise


def replication_of(model: nn.Module) -> Replication | None:
    return cast(Replication | None, vars(model).get(MARK))


def replicate(model: nn.Module, ranges: list[list[int]]) -> None:
    """Put copies of the layers in ``ranges``, which share their parameters, in the place of the layers."""
    inner, owner, name = find_layers(model)
    layers = cast(nn.ModuleList, getattr(owner, name))
    if outside := [pair for pair in ranges if pair[1] > len(layers)]:
        raise ConfigError(f"layer_replication: the model has {len(layers)} layers, and {outside} goes beyond")
    order = [index for start, end in ranges for index in range(start, end)]
    done = Replication(ranges, owner, name, layers)
    setattr(owner, name, nn.ModuleList(_twin(layers[source], place) for place, source in enumerate(order)))
    config = getattr(inner, "config", None)
    new: dict[str, Any] = {"num_hidden_layers": len(order)}
    if kinds := getattr(config, "layer_types", None):
        new["layer_types"] = [kinds[source] for source in order]
    for key, value in new.items():
        if hasattr(config, key):
            done.settings[key] = (config, getattr(config, key))
            setattr(config, key, value)
    vars(model)[MARK] = done


def end_replication(model: nn.Module) -> None:
    """Give ``model`` its own layers back, if they were replicated."""
    done = vars(model).pop(MARK, None)
    if done is not None:
        setattr(done.owner, done.name, done.layers)
        for key, (config, value) in done.settings.items():
            setattr(config, key, value)


def find_layers(model: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    """The innermost model, the module that holds its list of layers, and that list's name.

    Raises ConfigError if there is none."""
    inner = model
    while isinstance(deeper := inner._modules.get("model"), nn.Module):
        inner = deeper
    inner = inner._modules.get("bert") or inner._modules.get("transformer") or inner
    for place in PLACES:
        path, _, name = place.rpartition(".")
        try:
            owner = inner.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(owner._modules.get(name), nn.ModuleList):
            return inner, owner, name
    raise ConfigError(
        f"layer_replication: {type(model).__name__} has no list of layers as Llama, Bert or Falcon have "
        f"({', '.join(PLACES)})"
    )


def _twin(layer: nn.Module, place: int) -> nn.Module:
    """A copy of ``layer`` around the same parameters, which knows that it is the one at ``place``."""
    # What is in the memo is taken to be copied.
    twin = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for module in twin.modules():
        if "layer_idx" in vars(module):  # where transformers' layers find their keys and values
            vars(module)["layer_idx"] = place
    return twin
