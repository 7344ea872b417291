"""Whether an engine uses every module of an adapter: parts of it are made loud, and must move the engine's
likelihoods as they move ours.

Engines pass over tensors that they have no place for, some without a word (vLLM 34591, llama.cpp 9065); a
small change that is missing hides in the rounding of the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.export.judges import Engine
from rankfold.export.told import Told, logprobs_of
from rankfold.lora.layers.registry import adapter_layers
from rankfold.models.base.base import Base
from rankfold.peft_surface import PeftModel

LOUD = 3.0  # of a weight's length, that the change of one module is made; several share it
POSITIONS = 16
# Of how far our likelihoods move, from which on theirs do not move as ours; and of how far they are from ours
# without any change.
UNLIKE, NOISES = 0.05, 4
SURELY = 0.5


@dataclass(frozen=True)
class Probing:
    """An engine with the base's ``model`` as it reads it, and what writes an adapter for it into a folder."""

    engine: Engine
    model: Path
    write: Callable[[PeftModel, Path], Path]


@torch.inference_mode()
def passed_over(tuned: Base, told: Told, style: str, probing: Probing) -> tuple[int, list[str]]:
    """How many modules were tried, and the paths of those that the engine does not use as we do."""
    layers = _pairs(tuned.model)
    trial = _Trial(tuned, told, style, probing, layers)
    groups: dict[str, list[str]] = {}
    for path in layers:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    suspects, found = [*groups.values()], []
    while suspects:
        wrong = [part for part, is_wrong in zip(suspects, trial.differ(suspects), strict=True) if is_wrong]
        found += [part[0] for part in wrong if len(part) == 1]
        halves = [part for part in wrong if len(part) > 1]
        suspects = [half for part in halves for half in (part[: len(part) // 2], part[len(part) // 2 :])]
    return len(layers), sorted(found)


@dataclass(frozen=True)
class _Trial:
    tuned: Base
    told: Told
    style: str
    probing: Probing
    layers: Mapping[str, Any]

    def differ(self, parts: Sequence[Collection[str]]) -> list[bool]:
        """For each part, whether the engine's likelihoods move otherwise than ours when it is loud."""
        own: list[Tensor] = []
        prompts = [self._asked()]
        with TemporaryDirectory() as folder:
            place, groups = Path(folder), []
            for number, part in enumerate([(), *parts]):
                with loud(self.layers, part):
                    own.append(self._own())
                    (place / f"adapter-{number}").mkdir()
                    adapter = self.probing.write(self.tuned.model, place / f"adapter-{number}")
                groups.append({"adapter": str(adapter), "prompts": prompts, "asked": False})
            self.probing.engine.run(place, self.probing.model, self.style, groups)
            its = [self._read(place / f"{number}-0.npy") for number in range(len(groups))]
        quiet, *moved = own
        noise = float((its[0] - quiet).norm())
        return [_differs(a - quiet, b - its[0], noise) for a, b in zip(moved, its[1:], strict=True)]

    def _asked(self) -> dict[str, Any]:
        question = self.told.question
        messages = {"messages": [*question.messages], "tools": [*question.tools]}
        return messages | {"ids": self.told.ids, "answer": self.told.answer[:POSITIONS], "own": []}

    def _own(self) -> Tensor:
        return logprobs_of(self.tuned.model, self.told.ids, self.told.answer[:POSITIONS])

    def _read(self, file: Path) -> Tensor:
        return torch.from_numpy(np.load(file))[:, : self.told.logprobs.shape[1]].log_softmax(-1)


def _differs(own: Tensor, its: Tensor, noise: float) -> bool:
    moved = float(own.norm()) + 1e-6
    return not float((its - own).norm()) / moved < min(max(UNLIKE, NOISES * noise / moved), SURELY)


def _pairs(model: PeftModel) -> dict[str, Any]:
    [adapter] = model.peft_config
    layers: list[tuple[str, Any]] = [*adapter_layers(model.get_base_model())]
    return {path: layer for path, layer in layers if adapter in layer.r}


@contextmanager
def loud(layers: Mapping[str, Any], paths: Collection[str]) -> Iterator[None]:
    """The pairs of ``paths`` drawn anew, so that they change their weights by much; all others by nothing."""
    kept = {}
    generator = torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        [adapter] = layer.r
        lora_a, lora_b = layer.factors(adapter)
        kept[path] = lora_b.data
        drawn = torch.zeros_like(lora_b)
        if path in paths:
            drawn = torch.randn(lora_b.shape, generator=generator).to(lora_b)
            length = float((drawn @ lora_a).norm()) * layer.scaling[adapter]
            drawn *= LOUD / len(paths) ** 0.5 * float(layer.weight.norm()) / max(length, 1e-12)
        lora_b.data = drawn
    try:
        yield
    finally:
        for path, layer in layers.items():
            [adapter] = layer.r
            layer.factors(adapter)[1].data = kept[path]
