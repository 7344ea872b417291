"""The weights of a base with an adapter in them, one after another.

The adapter is put on a model whose weights are zeros that no memory was given to yet; a layer's own are read
when its merged ones are asked for, and forgotten after.  So all kinds of adapters are merged by their own
layers, and what is held at a time is one layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.errors import AdapterError, ModelError
from rankfold.lora.files.adapter_reader import AdapterSource, compare_base
from rankfold.lora.files.fingerprint import BaseFingerprint, Mark, base_tensors, fingerprint_of, mark_of
from rankfold.lora.layers.base import AdapterLayer
from rankfold.lora.layers.overrides import HeldParameters
from rankfold.lora.layers.registry import adapter_layers
from rankfold.models.base.content import Content
from rankfold.peft_surface import PeftModel
from rankfold.peft_surface.findings import read_config
from rankfold.peft_surface.tasks import model_class

ADAPTER = "default"
Checkpoint = Mapping[str, tuple[str, Callable[[], Content]]]
BASE = "base"


def on_zeros(model: nn.Module, adapter: Path, allow: Collection[str]) -> PeftModel:
    """``model``, made on the meta device, with zeros for weights and with ``adapter`` on it.  That these are
    not the weights of its base is no fault here: see ``Merging.check_base``."""
    made: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # so that no id is another's
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.from_numpy(np.zeros(parameter.shape, np.float32))
                module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(zeros, False))
    del kept
    source = replace(AdapterSource.of(adapter, {"allow": allow}), base_is_there=False)  # type: ignore[typeddict-item]
    config = read_config(source, is_trainable=False)
    return model_class(config)(model, config, ADAPTER, source=source).eval()


class Merging:
    """The values of the parameters of ``tuned`` (see ``on_zeros``), whose base is in ``checkpoint``;
    ``file_keys`` are those of the adapter's file."""

    def __init__(self, tuned: PeftModel, checkpoint: Checkpoint, file_keys: Collection[str]) -> None:
        self.tuned, self.checkpoint = tuned, checkpoint
        model = tuned.get_base_model()
        self.files = {name: read for name, read in checkpoint.values() if name}
        self.groups = _groups(model)
        self.moved: dict[str, tuple[str, AdapterLayer]] = {}
        self.held: dict[str, Tensor] = {}
        for path, layer in adapter_layers(model):
            if ADAPTER not in layer.adapter_names() or layer.leader is not None:
                continue
            if isinstance(layer, HeldParameters):
                self.held |= {p: each.own.detach() for each in layer.held[ADAPTER] for p in each.paths}
            else:
                self.moved |= {_joined(path, key): (path, layer) for key, _ in layer.base_parameters()}
        self.followers = {
            _joined(path, key)
            for path, layer in adapter_layers(model)
            if layer.leader is not None
            for key, _ in layer.base_parameters()
        }
        self.file_keys = file_keys
        self.marks: dict[str, Mark] = {}
        self.change: tuple[Tensor, Tensor] | None = None
        self._last: AdapterLayer | None = None
        self._values: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    def tensors(self) -> Iterator[tuple[str, Tensor, torch.dtype | None]]:
        """Key, value and the dtype that the file has, None for GGUF's blocks, of each tensor of the
        checkpoint, and of those parameters that are no longer tied to another's."""
        given: dict[str, torch.dtype | None] = {}
        for key, (name, read) in self.checkpoint.items():
            content = read()
            given[name] = dtype = content.data.dtype if content.kind is None else None
            self.change = None
            if name in self.groups and self.is_touched(name):
                del content
                yield key, self.value(name), dtype
            else:
                numbers = content.numbers()
                if name in self.groups:
                    self._mark(name, numbers)
                del content
                yield key, numbers, dtype
                del numbers
        for name in self.untied:
            if name not in given:
                yield name, self.value(name), next(given[n] for n in self.groups[name] if n in given)

    @property
    def untied(self) -> list[str]:
        """The names of parameters that the adapter makes unlike others with which they were one."""
        apart = [
            group
            for group in self.groups.values()
            if len({self._source(name) for name in group}) > 1
            or 0 < len({*group} & {*self.held}) < len(group)
        ]
        return list(dict.fromkeys(name for group in apart for name in group))

    def value(self, name: str) -> Tensor:
        """The value of a parameter with the adapter in it, at least float32; ``change`` is then what it was
        and is, None where the adapter leaves it."""
        source = self._source(name)
        self.change = None
        if not source:
            return self._base(name)
        before, after = self._merged(*self.moved[source])
        if after[source] is not before[source]:
            self.change = before[source], after[source]
        return after[source]

    def copies(self) -> list[str]:
        """The parameters of which the adapter has a copy that is the base's own."""
        return [name for name, own in self.held.items() if torch.equal(self._of_files(name), own.float())]

    def is_touched(self, name: str) -> bool:
        """Whether a parameter of the model is not simply the base's."""
        return name in self.held or bool(self._source(name))

    def _source(self, name: str) -> str:
        """The name of a parameter of an adapted layer whose value this one has; empty if it is the base's, or
        one that the adapter brings."""
        if name in self.moved:
            return name
        led = [other for other in self.groups[name] if other in self.moved]
        return led[0] if name in self.followers and led else ""

    def _base(self, name: str) -> Tensor:
        """The base's value, at least float32, or the one that the adapter brings in its place."""
        return self.held[name] if name in self.held else self._of_files(name)

    def _of_files(self, name: str) -> Tensor:
        read = next((self.files[other] for other in self.groups[name] if other in self.files), None)
        if read is None:
            raise ModelError(f"the base's files hold no {name}, or hold it in parts to be put together")
        numbers = read().numbers()
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        self._mark(name, numbers)
        return numbers

    def _mark(self, name: str, numbers: Tensor) -> None:
        mark = mark_of(numbers)
        sample = None if mark.sample is None else mark.sample.to(torch.float32, copy=True)
        self.marks |= dict.fromkeys(self.groups[name], mark._replace(sample=sample))

    @torch.no_grad()
    def _merged(self, path: str, layer: AdapterLayer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values of all base parameters of ``layer`` by name, without and with the adapter."""
        if self._last is not layer:
            own = dict(layer.base_parameters())
            zeros = {key: parameter.data for key, parameter in own.items()}
            for key, parameter in own.items():
                parameter.data = self._base(_joined(path, key))
            before = {key: parameter.data for key, parameter in own.items()}
            after = before | layer.merged_values([ADAPTER])
            for key, parameter in own.items():
                parameter.data = zeros[key]
            named = [{_joined(path, key): value for key, value in side.items()} for side in (before, after)]
            self._last, self._values = layer, (named[0], named[1])
        return self._values

    def check_base(self, allow: Collection[str]) -> list[str]:
        """What could not be checked, once all tensors were asked for.  Raises AdapterError if the base is not
        the one that the adapter was trained on."""
        saved = self.tuned.adapter_metadata[ADAPTER].base
        if saved is None:
            return ["the adapter does not say what its base's weights were"]
        model, config = self.tuned.get_base_model(), self.tuned.peft_config[ADAPTER]
        problem, unchecked = compare_base(saved, config, self.file_keys, model, self._print)
        if problem and BASE not in allow:
            raise AdapterError(
                f"the adapter belongs to another base model: {problem}; name the right one with --model, or "
                "allow 'base' (--allow base) to write it all the same"
            )
        told = [f"the adapter belongs to another base model: {problem}"] if problem else []
        return [*told, *([f"not checked: {unchecked}"] if unchecked else [])]

    def _print(self, leave_out: Collection[str]) -> BaseFingerprint:
        names = base_tensors(self.tuned.get_base_model(), leave_out)
        for name in names.keys() - self.marks.keys():
            self._of_files(name)
        return fingerprint_of({name: self.marks[name] for name in names})


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _groups(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter's name all names of that parameter."""
    by_id: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        added: tuple[str, ...] = type(module).added if isinstance(module, AdapterLayer) else ()
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in added:
                by_id.setdefault(id(parameter), []).append(_joined(path, key))
    return {name: names for names in by_id.values() for name in names}
