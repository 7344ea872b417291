"""What is in the files of a base's weights, tensor by tensor, by the names that its model has for them.

Files are read once, not mapped: mapped pages that the system drops under pressure would be read again in
every step, and llama.cpp's order of the rows of q and k is another one anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.compat import gguf_names, names_in_checkpoints, safetensors_files
from rankfold.errors import ModelError
from rankfold.models.base.find import BaseSource
from rankfold.models.internvl.loading import native_readers
from rankfold.models.internvl.names import Layout
from rankfold.storage.forms import FORMS, INT8, Form, expanded

GGUF_FORMS = [name for name in FORMS if name != INT8.name]
# transformers' processors that put rows of linear weights into another order at most.
ROW_WISE = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")
MATRIX = 2  # dimensions


@dataclass(frozen=True)
class Content:
    """A tensor of a file: numbers of any float dtype, or if it has a ``kind``, the rows' bytes, uint8
    (rows, bytes of a row), in GGUF's type of that name."""

    data: Tensor
    kind: str | None = None

    def numbers(self) -> Tensor:
        if self.kind is None:
            return self.data
        form = FORMS.get(self.kind)
        if form is not None:
            numbers, size = form.block(form.numbers)
            return expanded(self.data, form, self.data.shape[1] // size * numbers)
        return torch.from_numpy(_dequantised(self.data.numpy(), self.kind))

    def as_it_is(self) -> tuple[Form, Tensor]:
        """The form of the bytes, and the bytes.  Raises ModelError if there is no such form."""
        if self.kind is None or self.kind not in FORMS:
            raise ModelError(
                f"{self.kind} is none of the types that can be kept ({', '.join(GGUF_FORMS)}); "
                "take stored='bfloat16' or 'int8', or leave it out"
            )
        return FORMS[self.kind], self.data


Contents = Mapping[str, Callable[[], Content]]


@contextmanager
def contents_of(source: BaseSource, model: Any, original: Layout | None) -> Iterator[Contents]:
    """What is in the files of ``source``, by the names of ``model``; ``original`` if they are those of an
    InternVL in its original layout.  Raises ModelError."""
    if source.gguf_file is not None:
        yield _gguf(source.gguf_file, model)
    elif original is not None:
        with native_readers(Path(source.location), original) as readers:
            yield {name: partial(_plain, read) for name, read in readers.items()}
    else:
        with _safetensors(source.location) as found:
            yield _by_names_of(model, found)


def _plain(read: Callable[[], Tensor]) -> Content:
    return Content(read())


def _by_names_of(model: Any, found: Contents) -> Contents:
    """``found`` by the names that ``model`` has for what older versions of transformers called otherwise.

    Raises ModelError for a tensor that would have to be put together from several."""
    renamed = {}
    for key, (name, is_made) in names_in_checkpoints(model, found).items():
        if is_made:
            raise ModelError(
                f"{key} must be put together with others, which held weights cannot; leave stored out"
            )
        renamed[name] = found[key]
    return renamed


@contextmanager
def _safetensors(location: str | Path) -> Iterator[Contents]:
    """What is in the safetensors files of a folder or hub model."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = safetensors_files(location)
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {key: _reader(file, key) for file in opened for key in file.keys()}  # noqa: SIM118


def _reader(file: Any, key: str) -> Callable[[], Content]:
    return lambda: Content(file.get_tensor(key))


def _gguf(path: Path, model: Any) -> Contents:
    """What is in a GGUF file, by the names and in the order of rows of ``model``."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    processor, names = gguf_names(model, architecture)
    if type(processor).__name__ not in ROW_WISE:
        raise ModelError(f"the weights of a {architecture} cannot be kept as they are; leave stored out")
    return {
        names[tensor.name]: partial(_read, path, tensor, processor)
        for tensor in reader.tensors
        if tensor.name in names
    }


def _read(path: Path, tensor: Any, processor: Any) -> Content:
    """A tensor of a GGUF file, read and not mapped: what the reader has mapped would be in memory twice."""
    kind = tensor.tensor_type.name
    shape, dtype = tensor.data.shape, tensor.data.dtype
    found = np.fromfile(path, dtype, tensor.data.size, offset=tensor.data_offset).reshape(shape)
    if kind == "F32" or len(shape) != MATRIX:
        numbers = _dequantised(found, kind)
        return Content(torch.from_numpy(processor.process(weights=numbers, name=tensor.name).weights))
    rows = processor.process(weights=found.view(np.uint8), name=tensor.name).weights
    return Content(torch.from_numpy(np.ascontiguousarray(rows)), kind)


def _dequantised(found: Any, kind: str) -> Any:
    from gguf import GGMLQuantizationType, dequantize

    return dequantize(found, GGMLQuantizationType[kind])
