"""The tensors of a GGUF file by the names, and in the order of rows, of a model of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from rankfold.errors import ModelError, bullet_list
from rankfold.models.base.content import Content, Contents
from rankfold.models.gguf.architectures import ARCHITECTURES, TENSORS_APART, Architecture
from rankfold.models.gguf.file import GgufFile, expanded

SUFFIXES = (".weight", ".bias")
MATRIX = 2  # dimensions


def gguf_contents(file: GgufFile, model: Any) -> Contents:
    """What is in ``file``, by the names of ``model``.

    Raises ModelError naming every tensor that the model has no place for."""
    if file.architecture not in ARCHITECTURES:
        raise ModelError(f"the weights of a {file.architecture} cannot be held; leave stored out")
    parameters = [name for name, _ in model.named_parameters()]
    places = {
        name: parameter
        for parameter, name in tensor_names(file.architecture, model.config, parameters).items()
    }
    lost = sorted(file.tensors.keys() - places.keys() - {*TENSORS_APART})
    if lost:
        text = f"{file.path.name} holds tensors that a {model.config.model_type} has no place for:"
        raise ModelError(bullet_list(text, lost))
    architecture, config = ARCHITECTURES[file.architecture], model.config
    return {
        places[name]: partial(_read, file, name, architecture, config)
        for name in file.tensors
        if name not in TENSORS_APART
    }


def tensor_names(architecture: str, config: Any, parameters: Iterable[str]) -> dict[str, str | None]:
    """What GGUF calls each of the ``parameters`` of a model; None for what it has no name for."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    return {name: names.get_name(name, try_suffixes=SUFFIXES) for name in parameters}


def _read(file: GgufFile, name: str, architecture: Architecture, config: Any) -> Content:
    data, kind = file.data(name), file.tensors[name].kind
    turned = turned_heads(name, architecture, config)
    if turned:
        data = rows_of_pairs(data, turned)
    if kind == "F32" or data.ndim != MATRIX:
        numbers = expanded(data, kind)
        if architecture.norms_of_one and name.endswith("norm.weight"):
            numbers = numbers - 1
        return Content(torch.from_numpy(numbers))
    return Content(torch.from_numpy(np.ascontiguousarray(data).view(np.uint8)), kind)


def turned_heads(name: str, architecture: Architecture, config: Any) -> int:
    """How many heads the rows of a tensor are of, if they lie in llama.cpp's order; else 0."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    return next((count for part, count in heads.items() if architecture.turned and part in name), 0)


def rows_in_pairs(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """``rows`` in llama.cpp's order: the other way round than when they are read."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rows_of_pairs(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of the rows of q and k: LlamaModel.permute in its conversion/llama.py."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
