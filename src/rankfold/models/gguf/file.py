"""What a GGUF file holds, as it is written there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.compat import gguf_header
from rankfold.errors import ModelError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor: its ``shape`` in torch's order, the name of GGUF's type, and its ``place`` in the file."""

    shape: tuple[int, ...]
    kind: str
    place: int


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of one file.  Get it from ``read_gguf``."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    def own(self, key: str, default: Any = None) -> Any:
        """The value of one of the architecture's keys, named without it."""
        return self.keys.get(f"{self.architecture}.{key}", default)

    def data(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's values if it is F32 or F16, else the bytes of its rows.

        It is read and not mapped: mapped pages that the system drops would be read again in every step."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor = self.tensors[name]
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
        dtype: Any = {"F32": np.float32, "F16": np.float16}.get(tensor.kind, np.uint8)
        count = prod(tensor.shape) // numbers * size // np.dtype(dtype).itemsize
        found = np.fromfile(self.path, dtype, count, offset=tensor.place)
        if found.size != count:
            raise ModelError(f"{self.path} ends within the tensor {name}: it was cut off")
        if dtype is not np.uint8:
            return found.reshape(tensor.shape)
        return found.reshape(*tensor.shape[:-1], tensor.shape[-1] // numbers * size)

    def numbers(self, name: str) -> Tensor:
        """A tensor expanded to float32."""
        return torch.from_numpy(expanded(self.data(name), self.tensors[name].kind))


def read_gguf(path: Path, words: bool = True) -> GgufFile:
    """The file; without ``words`` its lists of texts are told by their length, which takes less time.

    Raises ModelError, also for a part of a model and for what is no model."""
    from gguf import GGMLQuantizationType

    try:
        keys, table, start = gguf_header(path, words)
        tensors = {
            name: StoredTensor(shape, GGMLQuantizationType(kind).name, start + offset)
            for name, shape, kind, offset in table
        }
    except Exception as error:  # a damaged file raises whatever its reader happens to raise
        raise ModelError(f"cannot load the model {path}: {str(error) or repr(error)}") from error
    if keys.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is part {keys.get('split.no', 0) + 1} of {keys['split.count']}; "
            "put them together with: llama-gguf-split --merge"
        )
    kind = keys.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path} holds no language model: its general.type is {kind!r}")
    return GgufFile(path, keys, tensors)


def expanded(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """What ``data`` (see ``GgufFile.data``) means, in float32."""
    from gguf import GGMLQuantizationType, dequantize

    numbers: np.ndarray[Any, Any] = dequantize(data, GGMLQuantizationType[kind])
    return numbers.astype(np.float32, copy=False)
