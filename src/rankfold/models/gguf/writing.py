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

from rankfold.models.gguf.architectures import Architecture
from rankfold.models.gguf.file import GgufFile
from rankfold.models.gguf.tensors import MATRIX, rows_in_pairs, turned_heads

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
FEW_BITS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
WORDS = ("token_embd.weight", "output.weight")
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


def stored_numbers(
    value: Tensor, planned: Planned, architecture: Architecture, config: Any
) -> tuple[np.ndarray[Any, Any], Tensor]:
    """``value``, a parameter of transformers' model, as the data of its tensor; and what that data means,
    by transformers' names again."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    numbers = value.float().numpy()
    added = architecture.norms_of_one and planned.name.endswith("norm.weight")
    heads = turned_heads(planned.name, architecture, config)
    raw = GGMLQuantizationType[planned.kind]
    data = quantize(numbers + 1 if added else numbers, raw)
    meant = torch.from_numpy(dequantize(data, raw).astype(np.float32, copy=False))
    return rows_in_pairs(data, heads) if heads else data, meant - 1 if added else meant
