"""A base model whose linear and embedding weights are held in few bytes, filled tensor by tensor.

The model is made without memory and never there as float32.  Files are read once, not mapped: mapped
pages that the system drops under pressure would be read again in every step, and llama.cpp's order of
the rows of q and k is another one anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.errors import ModelError, bullet_list
from rankfold.models.find import BaseSource
from rankfold.storage.forms import BF16, FORMS, INT8, Form, expanded, to_bf16, to_int8
from rankfold.storage.layers import can_hold, held_layers, hold

Stored = Literal["bfloat16", "int8", "gguf"]
ROUNDED: dict[str, tuple[Form, Callable[[Tensor], Tensor]]] = {
    "bfloat16": (BF16, to_bf16),
    "int8": (INT8, to_int8),
}
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


def held_model(config: Any, source: BaseSource, stored: Stored, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model of ``config`` with the weights of ``source`` held as ``stored``.

    "gguf" keeps the blocks of a GGUF file as they are; "bfloat16" and "int8" (a scale for each output)
    round once.  Norms, biases and what cannot be held are in ``dtype``, and so is what an embedding gives.
    Raises ModelError listing what is missing or cannot be held."""
    from accelerate.big_modeling import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    if stored not in get_args(Stored):
        raise ModelError(f"stored={stored!r}: take one of {', '.join(get_args(Stored))}")
    if stored == "gguf" and source.gguf_file is None:
        raise ModelError(f"stored='gguf' keeps a GGUF file's own blocks, and {source.name} is no GGUF file")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # which the block above took apart
    if source.gguf_file is not None:
        fill(model, _gguf(source.gguf_file, model), stored, dtype)
        return model
    with _safetensors(source.location) as contents:
        fill(model, contents, stored, dtype)
    with suppress(OSError):  # a folder need not have one
        model.generation_config = GenerationConfig.from_pretrained(source.location)
    return model


def describe(model: nn.Module) -> str:
    """How the weights of ``model`` are held, in words."""
    layers = {id(layer.held): layer for layer in held_layers(model).values()}.values()
    counts = Counter(layer.form.name for layer in layers)
    size = sum(layer.held.numel() for layer in layers) / 1e6
    kinds = ", ".join(f"{count} as {name}" for name, count in counts.most_common())
    plain = [p for p in model.parameters() if p.dim() >= MATRIX and p.is_floating_point()]
    rest = sum(p.numel() * p.itemsize for p in plain) / 1e6
    also = f"; {len(plain)} more take {rest:,.0f} MB, as they cannot be held so" if plain else ""
    return f"{len(layers)} weights are held in {size:,.0f} MB ({kinds}) and expanded when they are used{also}"


def fill(model: nn.Module, contents: Contents, stored: Stored, dtype: torch.dtype) -> None:
    """Give every parameter of ``model``, made without memory, its content.

    Raises ModelError listing every parameter that has none or one of another shape."""
    problems = []
    for names, users in _parameters(model):
        name = next((name for name in names if name in contents), None)
        if name is None:
            problems.append(f"{names[0]} is missing")
            continue
        try:
            _place(users, contents[name](), stored, dtype)
        except ModelError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError(bullet_list(f"the weights do not fit a {type(model).__name__}:", problems))


def _parameters(model: nn.Module) -> list[tuple[list[str], list[tuple[nn.Module, str]]]]:
    """Each parameter by all of its names, with the modules that use it under a key."""
    found: dict[int, tuple[list[str], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            names, users = found.setdefault(id(parameter), ([], []))
            names.append(f"{path}.{key}" if path else key)
            users.append((module, key))
    return list(found.values())


def _place(users: list[tuple[nn.Module, str]], content: Content, stored: Stored, dtype: torch.dtype) -> None:
    """Give all ``users`` of one parameter, each a module and a key, what it holds.  Raises ModelError."""
    wanted = users[0][0]._parameters[users[0][1]].shape  # type: ignore[union-attr]
    can_be_held = len(wanted) == MATRIX and all(key == "weight" and can_hold(module) for module, key in users)
    if not can_be_held or (stored == "gguf" and content.kind is None):
        numbers = content.numbers()
        if numbers.shape != wanted:
            raise ModelError(f"its shape is {tuple(numbers.shape)}, wanted {tuple(wanted)}")
        parameter = nn.Parameter(numbers.to(dtype, copy=True), requires_grad=False)
        for module, key in users:
            module._parameters[key] = parameter
        return
    if stored == "gguf":
        form, held = content.as_it_is()
    else:
        form, rounded = ROUNDED[stored]
        held = rounded(content.numbers())
    parameter = nn.Parameter(held, requires_grad=False)
    for module, _ in users:
        hold(module, form, parameter).numbers_like = torch.empty(0, dtype=dtype)


@contextmanager
def _safetensors(location: str | Path) -> Iterator[Contents]:
    """What is in the safetensors files of a folder or hub model."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    index = cached_file(location, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = (
        get_checkpoint_shard_files(location, index)[0]
        if index
        else [cached_file(location, "model.safetensors")]
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        yield {key: _reader(file, key) for file in opened for key in file.keys()}  # noqa: SIM118


def _reader(file: Any, key: str) -> Callable[[], Content]:
    return lambda: Content(file.get_tensor(key))


def _gguf(path: Path, model: Any) -> Contents:
    """What is in a GGUF file, by the names and in the order of rows of ``model``."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    if kind.__name__ not in ROW_WISE:
        raise ModelError(f"the weights of a {architecture} cannot be kept as they are; leave stored out")
    processor = kind(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
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
