"""Writing a model as a GGUF file, tensor after tensor, in the order and the types that llama.cpp reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.errors import MergeError
from rankfold.models.gguf.architectures import Architecture
from rankfold.models.gguf.file import GgufFile
from rankfold.models.gguf.tensors import MATRIX, rows_in_pairs, turned_heads

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
FEW_BITS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
WORDS = ("token_embd.weight", "output.weight")
ROWS_OF = 1 << 20  # numbers, that are worked on at a time
INSTEAD = "Q8_0"  # of types that cannot be made here


@dataclass(frozen=True)
class Key:
    """A value of the header, the number of its type in GGUF, and of a list that of its items."""

    value: Any
    kind: Any
    items: Any = None

    @classmethod
    def of(cls, value: Any) -> Key:
        """As llama.cpp's converter writes it: numbers in 32 bits."""
        from gguf import GGUFValueType as Kind

        if isinstance(value, list | tuple):
            return cls(list(value), Kind.ARRAY, Kind.get_type(value[0]) if value else Kind.INT32)
        kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
        return cls(value, kinds[type(value)])


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: its ``shape`` in torch's order, and GGUF's type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def stored(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of its data in numpy."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        dtype: Any = {"F32": np.float32, "F16": np.float16}.get(self.kind, np.uint8)
        if dtype is not np.uint8:
            return self.shape, np.dtype(dtype)
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return (*self.shape[:-1], self.shape[-1] // numbers * size), np.dtype(np.uint8)

    @property
    def size(self) -> int:
        shape, dtype = self.stored
        return int(prod(shape)) * int(dtype.itemsize)


@contextmanager
def gguf_writer(
    path: Path, architecture: str, keys: Mapping[str, Key], planned: Sequence[Planned]
) -> Iterator[Any]:
    """gguf's writer, which wants the data of all ``planned`` tensors, one after another in their order, by
    ``write_tensor_data``."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    for name, key in keys.items():
        writer.add_key_value(name, key.value, key.kind, key.items)
    for each in planned:
        shape, dtype = each.stored
        writer.add_tensor_info(each.name, shape, dtype, each.size, GGMLQuantizationType[each.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer
    finally:
        writer.close()


def keys_of_file(file: GgufFile) -> dict[str, Key]:
    """All keys of a file with their types, but the architecture's, which a writer adds itself."""
    from gguf import GGUFReader, GGUFValueType

    found = {}
    for field in GGUFReader(file.path).fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        items = field.types[-1] if kind == GGUFValueType.ARRAY else None
        found[field.name] = Key(field.contents(), kind, items)
    return found


def kind_for(name: str, shape: Sequence[int], wanted: str) -> str:
    """The type in which a tensor is written if matrices are to be ``wanted``: vectors stay numbers, and the
    words' matrices, which weigh most in what is said, have eight bits at least, as llama-quantize has it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) != MATRIX or wanted == "F32":
        return "F32"
    kind = INSTEAD if wanted in FEW_BITS and name in WORDS else wanted
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    return kind if shape[-1] % block == 0 else "F16"


def can_make(kind: str) -> bool:
    return kind in FILE_TYPES


@dataclass
class Rounding:
    """How far what is stored is from a weight, and how far that is from what it was before (squares)."""

    error: float = 0.0
    change: float = 0.0

    @property
    def lost(self) -> float:
        """The error to the length of the change; 0 where nothing changed."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def stored_numbers(
    value: Tensor, planned: Planned, architecture: Architecture, config: Any, before: Tensor | None = None
) -> tuple[np.ndarray[Any, Any], Rounding]:
    """``value``, a parameter of transformers' model, as the data of its tensor, some rows at a time; and how
    that rounds its change from ``before``.  Raises MergeError for numbers that the type has no room for."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    added = float(architecture.norms_of_one and planned.name.endswith("norm.weight"))
    raw, rounding = GGMLQuantizationType[planned.kind], Rounding()
    shape, dtype = planned.stored
    data = np.empty(shape, dtype)
    step = max(1, ROWS_OF // max(1, value[0].numel()))
    for place in range(0, len(value), step):
        part = value[place : place + step].float()
        with np.errstate(over="ignore"):
            data[place : place + step] = quantize((part + added).numpy(), raw)
        meant = torch.from_numpy(dequantize(data[place : place + step], raw).astype(np.float32, copy=False))
        error = (meant - added) - part
        if not error.isfinite().all():
            raise MergeError(
                f"{planned.name} has numbers up to {part.abs().max():.3g}, too large for {raw.name}"
            )
        if before is not None:
            rounding.error += float(error.square().sum())
            rounding.change += float((part - before[place : place + step]).square().sum())
    heads = turned_heads(planned.name, architecture, config)
    return rows_in_pairs(data, heads) if heads else data, rounding
