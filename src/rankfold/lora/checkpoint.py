"""An adapter's files: ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rankfold.errors import AdapterError, OutputError, bullet_list
from rankfold.files import write_whole
from rankfold.lora.config import LoraConfig

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(parameters: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write an adapter; the config comes last, so a folder that has one has the weights too.

    ``parameters`` maps ``<module>.lora_A.weight`` ... to tensors.  Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    write_whole(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    dataclasses.replace(config, inference_mode=True).save_pretrained(folder)


@torch.no_grad()
def load_adapter_file(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the tensors of ``folder`` into ``parameters``, all of them or none.

    Raises AdapterError listing every missing, unexpected, misshapen or non-finite tensor."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("adapter_model.*"))
        hint = f"; {others[0]} is not read, convert it with PEFT's save_pretrained" if others else ""
        raise AdapterError(f"{folder} holds no {WEIGHTS_NAME}{hint}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {error}") from error
    expected = {PREFIX + name: parameter for name, parameter in parameters.items()}
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        problems += _wrong_tensor(name, tensors[name], expected[name])
    if problems:
        raise AdapterError(bullet_list(f"{path} does not fit this model:", sorted(problems)))
    for name, parameter in expected.items():
        parameter.copy_(tensors[name])


def _wrong_tensor(name: str, got: Tensor, wanted: Tensor) -> list[str]:
    if got.shape != wanted.shape:
        return [f"shape of {name}: the file has {tuple(got.shape)}, the model wants {tuple(wanted.shape)}"]
    if not got.is_floating_point():
        return [f"dtype of {name}: {got.dtype} is not a floating-point type"]
    if not torch.isfinite(got).all():
        return [f"{name} holds NaN or infinite values"]
    return []
