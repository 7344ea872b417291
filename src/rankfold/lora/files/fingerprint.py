"""Telling one base model from another of the same shape, in milliseconds.

The fingerprint covers the names and shapes of the base's parameters, and a fixed sample of the values of
each, rounded to bfloat16.  It is therefore the same on every device, and for float64, float32 and bfloat16
copies of one checkpoint, and for one held in GGUF's blocks, whose numbers are sampled without expanding the
rest.  A base held in float16 or rounded to fewer bits has rounded its values in another way;
``storage`` says so, and two fingerprints of unlike storage are compared no further than they can be."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.factors import LoraLayer
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.registry import adapter_layers, base_modules
from rankfold.lora.layers.tokens import TokenLayer
from rankfold.storage.forms import INT8, ROUNDED_Q4_0
from rankfold.storage.layers import HeldLayer, held_layers

SAMPLES = 64  # values a parameter: any fine-tuning changes nearly all of them
ROUND_ALIKE = {torch.float64: "bfloat16", torch.float32: "bfloat16"}  # to what bfloat16 copies hold
NUMBERS = {"bfloat16", "float16"}  # storages that keep a weight in the weight's own shape


@dataclass(frozen=True)
class BaseFingerprint:
    """sha256 of the parameters' names and shapes, sha256 of the sampled values, and how they are held."""

    shapes: str
    values: str
    storage: str


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> BaseFingerprint:
    """The fingerprint of ``model`` without its adapters, as it is with none of them merged.

    ``leave_out`` names modules that the adapter replaces as a whole, such as a classification head:
    they start at random, so they are no mark of a base."""
    tensors = base_tensors(model, leave_out)
    held = {f"{path}.weight".lstrip("."): layer for path, layer in held_layers(model).items()}
    return fingerprint_of(
        {name: _held_mark(held[name]) if name in held else mark_of(tensors[name]) for name in tensors}
    )


class Mark(NamedTuple):
    """What a fingerprint takes of one parameter: its shape, how it is held, and up to SAMPLES of its values,
    if they can be read."""

    shape: Sequence[int]
    storage: str
    sample: Tensor | None


def fingerprint_of(marks: Mapping[str, Mark]) -> BaseFingerprint:
    """The fingerprint of a base whose parameters, by name, have these ``marks``."""
    shapes = hashlib.sha256()
    ordered = [(name, marks[name]) for name in sorted(marks)]
    for name, mark in ordered:
        shapes.update(f"{name} {list(mark.shape)}\n".encode())
    samples = [mark.sample for _, mark in ordered if mark.sample is not None]
    if len({(sample.device, sample.dtype) for sample in samples}) > 1:
        samples = [sample.to(torch.bfloat16).cpu() for sample in samples]
    # One conversion and one transfer for all where they are of a kind.
    content = save({"samples": torch.cat(samples).to(torch.bfloat16).cpu()}) if samples else b""
    storage = "+".join(sorted({mark.storage for mark in marks.values()}))
    return BaseFingerprint(shapes.hexdigest(), hashlib.sha256(content).hexdigest(), storage)


def base_tensors(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """The parameters of the base by name, tied ones once, with the values they had before anything was
    merged, split or exchanged for an adapter's own."""
    endings = tuple(f".{name}." for name in leave_out)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        added = type(module).added if isinstance(module, AdapterLayer) else ()
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is None or id(parameter) in seen or key in added:
                continue
            seen.add(id(parameter))
            if not any(ending in f".{name}" for ending in endings):
                tensors[name] = parameter
    for path, layer in adapter_layers(model):
        originals = {f"{path}.{key}" if path else key: t for key, t in _originals(layer).items()}
        tensors |= {name: value for name, value in originals.items() if name in tensors}
    return tensors


def _originals(layer: AdapterLayer) -> dict[str, Tensor]:
    """The base parameters of ``layer`` that show another value now, by name."""
    if isinstance(layer, HeldParameters):
        return {path: held.original for each in layer.held.values() for held in each for path in held.paths}
    if isinstance(layer, TokenLayer):
        return {"weight": layer._originals_in_place()} if layer.merged else {}
    if isinstance(layer, LoraLayer) and layer.split is not None and layer.split.in_place:
        return {"weight": cast(Tensor, layer.spare_weight)}
    return dict(layer._originals)


def mark_of(tensor: Tensor) -> Mark:
    data = tensor.data
    if type(data) is not Tensor and not isinstance(data, nn.Parameter):
        return Mark(data.shape, type(data).__name__, None)
    if data.is_meta:
        return Mark(data.shape, "meta", None)
    storage = ROUND_ALIKE.get(data.dtype, str(data.dtype).removeprefix("torch."))
    return Mark(data.shape, storage, data.reshape(-1)[_sampled(data.numel())])


def _held_mark(layer: HeldLayer) -> Mark:
    """That of the numbers that a held weight is expanded to."""
    rows, columns = layer.shape
    places = torch.tensor(range(rows * columns)[_sampled(rows * columns)], device=layer.held.device)
    rounded = layer.form in (INT8, ROUNDED_Q4_0)
    storage = layer.form.name if rounded else ROUND_ALIKE[torch.float32]
    return Mark((rows, columns), storage, layer.numbers_at(places))


def _sampled(numel: int) -> slice:
    # An odd stride: one that divides the row length would read a single column.
    stride = max(1, numel // SAMPLES) | 1
    return slice(0, SAMPLES * stride, stride)


def compare(saved: BaseFingerprint, now: BaseFingerprint) -> tuple[str | None, str | None]:
    """What shows that the two are of different bases, and what could not be checked."""
    alike = saved.storage == now.storage
    as_numbers = {*saved.storage.split("+"), *now.storage.split("+")} <= NUMBERS
    if (alike or as_numbers) and saved.shapes != now.shapes:
        return "the names or shapes of its parameters differ", None
    if not alike:
        return None, f"the base's weights ({saved.storage} when it was saved, {now.storage} here)"
    return ("the weights differ" if saved.values != now.values else None), None
