"""An adapter's files: ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rankfold.errors import AdapterError, OutputError, bullet_list
from rankfold.files import write_whole
from rankfold.lora.config import LoraConfig
from rankfold.lora.layers import adapter_layers

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def file_tensors(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by their keys in PEFT's file.

    Where PEFT would hold a layer inside a wrapper, the path to what is in that layer has ``base_layer``."""
    layers = dict(adapter_layers(model))
    found: dict[str, nn.Parameter] = {}
    for path, layer in layers.items():
        parts = path.split(".")
        spelt = "".join(
            f"{part}.{'base_layer.' if '.'.join(parts[:end]) in layers and end < len(parts) else ''}"
            for end, part in enumerate(parts, start=1)
            if part
        )
        found |= {
            f"{PREFIX}{spelt}{key}": tensor for key, tensor in layer.adapter_tensors(adapter_name).items()
        }
    return found


def save_adapter(model: nn.Module, adapter_name: str, config: LoraConfig, folder: Path) -> None:
    """Write an adapter; the config comes last, so a folder that has one has the weights too.

    Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in file_tensors(model, adapter_name, config).items()
    }
    write_whole(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    dataclasses.replace(config, inference_mode=True).save_pretrained(folder)


@torch.no_grad()
def load_adapter_file(model: nn.Module, adapter_name: str, config: LoraConfig, folder: Path) -> None:
    """Copy the tensors of ``folder`` into the adapter, all of them or none.

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
    expected = file_tensors(model, adapter_name, config)
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
