"""An adapter's files: ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's layout."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rankfold.errors import AdapterError, OutputError, bullet_list
from rankfold.files import write_whole
from rankfold.lora.config.lora_config import CONFIG_NAME, LoraConfig
from rankfold.lora.config.names import PREFIX
from rankfold.lora.files.adapter_metadata import AdapterMetadata, log
from rankfold.lora.files.adapter_reader import (
    FLOATS,
    WEIGHTS_NAME,
    Fault,
    LoadResult,
    StoredAdapter,
    shown,
)
from rankfold.lora.files.fingerprint import BaseFingerprint
from rankfold.lora.layers.registry import adapter_layers

SHOWN_PER_KIND = 5
OTHER_NAMES = (
    "If the file has the same layers under other names, give key_mapping={pattern: replacement}; both are "
    "matched without base_model.model."
)


def file_tensors(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by their keys in PEFT's file.

    Where PEFT would hold a layer inside wrappers, the path to what is in that layer has as many times
    ``base_layer``."""
    layers = dict(adapter_layers(model))
    depths = {path: layer.file_depth(adapter_name) for path, layer in layers.items()}
    found: dict[str, nn.Parameter] = {}
    for path, layer in layers.items():
        parts = path.split(".")
        spelt = "".join(
            f"{part}.{'base_layer.' * depths.get('.'.join(parts[:end]), 0) if end < len(parts) else ''}"
            for end, part in enumerate(parts, start=1)
            if part
        )
        found |= {
            f"{PREFIX}{spelt}{key}": tensor for key, tensor in layer.adapter_tensors(adapter_name).items()
        }
    return found


def save_adapter(
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    folder: Path,
    facts: AdapterMetadata,
    base: BaseFingerprint | None,
) -> None:
    """Write an adapter: PEFT's two files and ``rankfold.json``, never in several parts.

    The config comes last, so a folder that has one has the weights too; after a half overwritten folder
    the hashes in ``rankfold.json`` do not fit.  Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    weights = save(_separate(tensors), metadata={"format": "pt"})
    saved = replace(config, inference_mode=True)
    as_json = json.dumps(saved.to_dict(), indent=2, sort_keys=True).encode()
    write_whole(folder / WEIGHTS_NAME, weights)
    facts.sealed({WEIGHTS_NAME: weights, CONFIG_NAME: as_json}, base).write(folder)
    saved.save_pretrained(folder)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed, and no two that share memory: the file has no sharing."""
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in stored.values())
    return {
        key: tensor.clone() if uses[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for key, tensor in stored.items()
    }


@torch.no_grad()
def fill_adapter(stored: StoredAdapter, wanted: Mapping[str, Tensor]) -> LoadResult:
    """Copy the tensors of ``stored`` into ``wanted``, all of them or none.

    Raises AdapterError listing everything that does not fit and is not allowed; says in one warning what
    was allowed."""
    folder, allow = stored.source.folder, stored.source.allow
    fits, faults, result = fitting(stored.tensors, wanted)
    found = [*stored.found, *faults]
    if refused := [each for each in found if each[0] not in allow]:
        raise AdapterError(bullet_list(f"{folder} does not fit this model:", listed(refused)))
    for key, tensor in fits.items():
        fill(wanted[key], tensor)
    if not fits and stored.tensors:
        refused = [each for each in found if each[0] in ("missing", "unexpected")]
        headline = f"{folder} does not fit this model: none of its tensors has a place."
        raise AdapterError(bullet_list(f"{headline} {OTHER_NAMES}", listed(refused)))
    found = [each for each in found if each[0] != "missing"]  # whoever called says it, by the model's names
    if found:
        warnings.warn(bullet_list(f"{folder} was loaded in spite of:", listed(found)), stacklevel=4)
    if not _has_effect(stored.tensors):
        log.info("%s: one factor of every pair is zero, so the adapter changes nothing", folder)
    return result


def fill(place: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``place``, which gets memory for it where it has none."""
    if place.is_meta:
        like = nn.Parameter(value.to(place.dtype, copy=True), requires_grad=place.requires_grad)
        torch.utils.swap_tensors(place, like)
    else:
        place.copy_(value)


def listed(found: list[tuple[Fault, str]]) -> list[str]:
    """The texts of ``found``, sorted; of each kind of fault a few only, so that no kind hides another."""
    lines = []
    for kind in get_args(Fault):
        texts = sorted(text for fault, text in found if fault == kind)
        more = len(texts) - SHOWN_PER_KIND
        lines += [*texts[:SHOWN_PER_KIND], *([f"{kind}: {more} more"] if more > 0 else [])]
    return lines


def fitting(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[Fault, str]], LoadResult]:
    """Which of ``tensors`` can go into ``wanted``, a fault for all that cannot, and the keys without
    counterpart."""
    result = LoadResult([k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted])
    faults: list[tuple[Fault, str]] = [("missing", f"missing: {shown(key)}") for key in result.missing_keys]
    faults += [("unexpected", f"unexpected: {shown(key)}") for key in result.unexpected_keys]
    fits = {}
    for key, place in wanted.items():
        got = tensors.get(key)
        if got is None:
            continue
        if got.shape != place.shape:
            sizes = f"the file has {tuple(got.shape)}, the model wants {tuple(place.shape)}"
            faults.append(("shape", f"size mismatch for {shown(key)}: {sizes}"))
        elif got.dtype not in (*FLOATS, place.dtype):
            faults.append(("shape", f"dtype of {shown(key)}: {got.dtype} is not a floating-point type"))
        else:
            fits[key] = got
    return fits, faults, result


def _has_effect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any factor that starts at zero is not zero any more, or there is something else."""
    idle = ("lora_A", "lora_embedding_B", "lora_magnitude_vector")
    effective = [tensor for key, tensor in tensors.items() if not any(part in key for part in idle)]
    return any(bool(tensor.float().count_nonzero()) for tensor in effective)
