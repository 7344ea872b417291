"""A batch whose rows belong to several adapters: each layer is run once an adapter, on that adapter's "
"rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, MergeError, bullet_list
from rankfold.lora.layers.attention import LoraMultiheadAttention
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.parameters import ParameterAdapters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.layers.saved import SavedModule

# Modules of ``modules_to_save`` whose output has a row for each row of the input.
ROWS_FIRST = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BASE = "__base__"  # PEFT's name for no adapter


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Within the block row i of every batch goes through the adapter ``names[i]``, or through none for
    ``__base__``.  With ``beams`` every row is there so many times, except in an encoder.

    Raises MergeError if an adapter is merged, ConfigError where an adapter layer does not see rows."""
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"Got adapter names of type {type(names).__name__}, expected a list of str.")
    layers = dict(adapter_layers(model))
    if merged := sorted({name for layer in layers.values() for name in layer.merged_adapters}):
        raise MergeError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` "
            f"first. Merged: {', '.join(merged)}"
        )
    wrong = [text for path, layer in layers.items() if (text := _cannot_tell_rows(path, layer))]
    if wrong:
        raise ConfigError(bullet_list("a batch cannot be shared among adapters here:", wrong))
    encoder = encoder_of(model) if beams > 1 else None
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    repeated = [name for name in names for _ in range(beams)]
    if holding := [n for n in dict.fromkeys(names) for layer in layers.values() if _holds(layer, n)]:
        raise ConfigError(f"{holding} bring biases or embeddings of their own, and a batch has one of each")
    before = {path: layer.__dict__.get("forward") for path, layer in layers.items()}
    active = {path: list(layer._active) for path, layer in layers.items()}
    try:
        for layer in layers.values():
            rows = list(names) if id(layer) in inside else repeated
            layer.__dict__["forward"] = partial(run_in_parts, layer, layer.forward, rows)
        yield
    finally:
        for path, layer in layers.items():
            layer.__dict__.pop("forward", None)
            if before[path] is not None:
                layer.__dict__["forward"] = before[path]
            _switch(layer, active[path])


def run_in_parts(layer: AdapterLayer, forward: Any, names: list[str], *args: Any, **kwargs: Any) -> Any:
    """The output of ``layer`` for a batch of which row i is the adapter ``names[i]``'s."""
    rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]
    if rows != len(names):
        raise ConfigError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    whole: Any = None
    for name in dict.fromkeys(names):
        index = torch.tensor([i for i, other in enumerate(names) if other == name])
        for part in (layer, *layer._modules.values()):  # an attention layer's output projection, too
            if isinstance(part, AdapterLayer):
                _switch(part, [name])
        output = forward(
            *(_rows_of(value, index, rows) for value in args),
            **{key: _rows_of(value, index, rows) for key, value in kwargs.items()},
        )
        whole = _put(whole, output, index, rows)
    return whole


def _cannot_tell_rows(path: str, layer: AdapterLayer) -> str | None:
    """Why the rows of a batch cannot be told apart where ``layer`` is called."""
    if isinstance(layer, ParameterAdapters):
        return (
            f"{path}: lora.ParamWrapper does not support mixed adapter batches yet: its module sees tokens, "
            "not the rows that they are of"
        )
    if isinstance(layer, LoraMultiheadAttention):
        return (
            f"{path}: lora.MultiheadAttention does not support mixed adapter batches: rows may be its "
            "second axis"
        )
    if isinstance(layer, SavedModule) and not isinstance(layer, ROWS_FIRST):
        names = ", ".join(kind.__name__ for kind in ROWS_FIRST)
        return f"{path}: Mixed batching is only supported for the following modules: {names}."
    return None


def _switch(layer: AdapterLayer, names: list[str]) -> None:
    """Let ``names`` count in one layer, whatever is trained."""
    layer.__dict__["_active"] = names
    layer.refresh()


def _holds(layer: AdapterLayer, name: str) -> bool:
    return isinstance(layer, HeldParameters) and name in layer.adapter_names()


def _rows_of(value: Any, index: Tensor, rows: int) -> Any:
    of_rows = isinstance(value, Tensor) and value.dim() and value.shape[0] == rows
    return value[index.to(value.device)] if of_rows else value


def _put(whole: Any, part: Any, index: Tensor, rows: int) -> Any:
    """``whole``, made if it is None yet, with the rows of ``part`` at ``index``."""
    if isinstance(part, tuple):
        wholes = whole if whole is not None else [None] * len(part)
        return tuple(_put(own, each, index, rows) for own, each in zip(wholes, part, strict=True))
    if not isinstance(part, Tensor):
        return part
    if whole is None:
        whole = part.new_zeros((rows, *part.shape[1:]))
    return whole.index_copy(0, index.to(part.device), part)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, if it has one."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = getattr(model, "get_encoder", lambda: None)()
    return found if isinstance(found, nn.Module) else None
