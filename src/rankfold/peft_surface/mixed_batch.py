"""A batch whose rows belong to several adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rankfold.compat import recomputes_activations
from rankfold.errors import ConfigError, MergeError, RankfoldError, bullet_list
from rankfold.lora.layers.attention import LoraMultiheadAttention
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.mixed import MixedForward, MixedRows
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.parameters import ParameterAdapters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.layers.saved import SavedModule
from rankfold.peft_surface.activated import activated

# Modules of ``modules_to_save`` whose output has a row for each row of the input.
ROWS_FIRST = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BASE = "__base__"  # PEFT's name for no adapter


@contextmanager
def forward_words(model: nn.Module, known: Collection[str], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """What the words of a forward or of ``generate`` say to adapters: ``adapter_names`` and
    ``alora_offsets``.  Raises ConfigError for a name that is not ``known``."""
    names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams") or 1
    if names is not None and (missing := sorted({*names} - {BASE, *known})):
        raise ConfigError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}")
    shared = nullcontext() if names is None else mixed_batch(model, names, beams=beams)
    with activated(model, kwargs.get("alora_offsets"), beams), shared:
        yield


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], beams: int = 1) -> Iterator[None]:
    """Within the block row i of every batch goes through the adapter ``names[i]``, or through none for
    ``__base__``.  With ``beams`` every row is there so many times, except in an encoder.

    Raises MergeError if an adapter is merged, ConfigError where an adapter layer does not see rows."""
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"Got adapter names of type {type(names).__name__}, expected a list of str.")
    carried = [name for name in dict.fromkeys(names) if name != BASE]
    layers = dict(adapter_layers(model))
    _check(model, layers, carried)
    encoder = encoder_of(model) if beams > 1 else None
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    repeated = [name for name in names for _ in range(beams)]
    whole, in_encoder = (
        MixedRows(carried, [None if name == BASE else name for name in each]) for each in (repeated, names)
    )
    with _through(layers, lambda layer: in_encoder if id(layer) in inside else whole):
        yield


@contextmanager
def mixed_batches(model: nn.Module, carried: Collection[str]) -> Iterator[MixedRows]:
    """Within the block the rows of each batch go through the adapters that the ``names`` of what is given
    say, which are to be set before it and are among ``carried``.  Raises what ``mixed_batch`` does."""
    layers = dict(adapter_layers(model))
    _check(model, _carrying(layers, carried), carried)
    rows = MixedRows(carried)
    with _through(layers, lambda _: rows):
        yield rows


def why_apart(model: nn.Module, name: str) -> str:
    """Why rows of the adapter ``name`` cannot be in a batch with others, or an empty string."""
    try:
        _check(model, _carrying(dict(adapter_layers(model)), [name]), [name])
    except RankfoldError as error:
        return str(error)
    return ""


def _carrying(layers: Mapping[str, AdapterLayer], names: Collection[str]) -> dict[str, AdapterLayer]:
    return {path: layer for path, layer in layers.items() if not {*names}.isdisjoint(layer.adapter_names())}


@contextmanager
def _through(
    layers: Mapping[str, AdapterLayer], rows_of: Callable[[AdapterLayer], MixedRows]
) -> Iterator[None]:
    states = [(layer, layer.__dict__.get("forward"), list(layer._active)) for layer in layers.values()]
    try:
        for layer, _, _ in states:
            layer.activate([])
            mixed = MixedForward(layer, rows_of(layer))
            if mixed.carried:
                layer.__dict__["forward"] = mixed
        yield
    finally:
        for layer, forward, active in states:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
            layer.activate(active)


def _check(model: nn.Module, layers: Mapping[str, AdapterLayer], names: Collection[str]) -> None:
    if torch.is_grad_enabled() and model.training and recomputes_activations(model):
        raise ConfigError(
            "a batch of several adapters is not known any more when checkpointed activations are recomputed: "
            "call gradient_checkpointing_disable() on the model first"
        )
    if merged := sorted({name for layer in layers.values() for name in layer.merged_adapters}):
        raise MergeError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` "
            f"first. Merged: {', '.join(merged)}"
        )
    wrong = [text for path, layer in layers.items() if (text := _cannot_tell_rows(path, layer))]
    if wrong:
        raise ConfigError(bullet_list("a batch cannot be shared among adapters here:", wrong))
    if holding := [n for n in dict.fromkeys(names) for layer in layers.values() if _holds(layer, n)]:
        raise ConfigError(f"{holding} bring biases or embeddings of their own, and a batch has one of each")


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


def _holds(layer: AdapterLayer, name: str) -> bool:
    return isinstance(layer, HeldParameters) and name in layer.adapter_names()


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, if it has one."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = getattr(model, "get_encoder", lambda: None)()
    return found if isinstance(found, nn.Module) else None
