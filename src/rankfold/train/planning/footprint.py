"""How many bytes a base takes in each form that its weights can be held in, and an adapter on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankfold.lora.layers.registry import base_modules
from rankfold.models.adapters.modalities import ModelParts, model_parts
from rankfold.storage.forms import FORMS, INT8
from rankfold.storage.layers import can_hold

ENDS = "embeddings and head"
PLAIN_PARTS = ("projector", "vision")  # which are not held in few bytes
Q4 = FORMS["Q4_0"]  # 4.5 bits a number, as many as Q4_K takes
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256  # numbers that share a scale; scales that share a scale of their own
WEIGHT_BYTES, GRADIENT_BYTES, MOMENT_BYTES, BEST_BYTES = 4, 4, 8, 4  # float32; AdamW's two moments; a copy


@dataclass(frozen=True)
class Weight:
    """A parameter of a base: how many numbers it has, in rows of ``columns`` if it ``can_be_held``, which
    part of the model it belongs to, and whether it is a linear layer's."""

    numbers: int
    columns: int
    part: str
    can_be_held: bool
    is_linear: bool

    def held_bytes(self, row_bytes: Callable[[int], int], rest: int) -> int:
        """As rows of ``row_bytes(columns)``, or at ``rest`` bytes a number if it cannot be held so."""
        if not self.can_be_held or self.part in PLAIN_PARTS:
            return self.numbers * rest
        return self.numbers // self.columns * row_bytes(self.columns)


@dataclass(frozen=True)
class StorageForm:
    """A form that a base's weights can be held in: its bytes a row, the bytes of a number that is not held
    so, and how ``rankfold train`` is told, or why it cannot be."""

    name: str
    size: Callable[[Weight, int], int]
    told: str
    is_exact: bool = False  # whether it is also the dtype that everything is computed in


def _plain(weight: Weight, _: int, itemsize: int) -> int:
    return weight.numbers * itemsize


def _nf4(weight: Weight, rest: int) -> int:
    """bitsandbytes' NF4 with its scales quantised once more (Dettmers et al. 2023, arXiv 2305.14314)."""
    if weight.part in PLAIN_PARTS:
        return weight.numbers * rest
    if not weight.is_linear or weight.part == ENDS:
        return weight.numbers * torch.bfloat16.itemsize
    scales = math.ceil(weight.numbers / NF4_BLOCK)
    return math.ceil(weight.numbers / 2) + scales + 4 * math.ceil(scales / NF4_SECOND_BLOCK)


def _q4_0(weight: Weight, rest: int) -> int:
    """Embeddings and head, and rows that no blocks fit, as int8."""
    blocks = weight.is_linear and weight.part != ENDS and weight.columns % Q4.numbers == 0
    return weight.held_bytes((Q4 if blocks else INT8).row_bytes, rest)


FORMS_TO_PLAN: tuple[StorageForm, ...] = (
    StorageForm("float32", lambda w, _: _plain(w, 0, 4), "--precision float32", is_exact=True),
    StorageForm("bfloat16", lambda w, _: _plain(w, 0, 2), "--precision bfloat16", is_exact=True),
    StorageForm("int8", lambda w, rest: w.held_bytes(INT8.row_bytes, rest), "--stored int8"),
    StorageForm("q4_0", _q4_0, "--stored q4_0"),
    StorageForm("nf4", _nf4, "--stored nf4"),
)


def weights_of(model: Any) -> list[Weight]:
    """Every parameter of a base without an adapter, once each."""
    parts = model_parts(model)
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    return list(_weights(model, parts, ends))


def _weights(model: nn.Module, parts: ModelParts, ends: set[int]) -> Iterator[Weight]:
    seen: set[int] = set()
    for path, module in base_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part = ENDS if id(module) in ends else parts.part_of(path) or "language"
            held = key == "weight" and can_hold(module)
            columns = parameter.shape[-1] if parameter.dim() else 1
            linear = held and isinstance(module, nn.Linear)
            yield Weight(parameter.numel(), columns, part, held, linear)


def parameters_by_part(weights: list[Weight]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for part in (ENDS, "language", "projector", "vision"):
        if count := sum(weight.numbers for weight in weights if weight.part == part):
            counted[part] = count
    return counted


def stored_bytes(weights: list[Weight], form: StorageForm, rest: int = 4) -> int:
    """All ``weights`` in ``form``; what cannot be held takes ``rest`` bytes a number."""
    return sum(form.size(weight, rest) for weight in weights)


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """What is trained, in numbers and bytes.  ``told`` says for each part which layers match."""

    rank: int
    alpha: float
    trained: int
    told: list[str]

    @property
    def weight_bytes(self) -> int:
        """Of the weights alone, which is about the file's size."""
        return self.trained * WEIGHT_BYTES

    @property
    def training_bytes(self) -> int:
        """With gradients and AdamW's moments."""
        return self.trained * (WEIGHT_BYTES + GRADIENT_BYTES + MOMENT_BYTES)
