"""Writing an adapter as mlx loads it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rankfold.errors import AdapterError, OutputError, bullet_list
from rankfold.files import write_whole
from rankfold.lora import LoraConfig
from rankfold.lora.config.lora_config import CONFIG_NAME
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.lora_weights import Pair, beside_pairs, is_embedding, padded, pair_of, sorted_out
from rankfold.models.mlx.layout import MAGNITUDE, MLX_WEIGHTS, RECORD, MlxBase, Unpacked

BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
EVERY_BLOCK = -1
HEADS = ("lm_head", "output")


def write_mlx(adapter: Unpacked, base: MlxBase, out: Path) -> list[str]:
    """Write ``adapter`` to the folder ``out``, and return its keys.

    Exact: a lower rank is filled with zeros, and a scale that differs from the others' by a power of two
    goes into ``lora_b``.  Raises AdapterError for what mlx has no room for, OutputError."""
    config = adapter.config
    modules = sorted_out(adapter.tensors)
    pairs = {path: pair_of(path, own, config) for path, own in modules.pairs.items()}
    if not pairs:
        raise AdapterError("this adapter has no place in mlx's layout: it adapts no module")
    scale = _common_scale(pairs, config)
    scaled = {path: _scaled(pair, pair.scale / scale) for path, pair in pairs.items()}
    problems = [*_problems(config, modules.saved), *_pair_problems(pairs, base)]
    problems += [
        _other_scale(path, pairs[path].scale, scale) for path, pair in scaled.items() if pair is None
    ]
    if problems:
        raise AdapterError(bullet_list("this adapter has no place in mlx's layout:", problems))
    rank = max(pair.rank for pair in pairs.values())
    whole = {base.mlx_name(path): padded(pair, rank) for path, pair in scaled.items() if pair is not None}
    keys, count = _keys([*whole], base)
    described = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": config.lora_dropout, "keys": keys},
        "model": config.base_model_name_or_path,
        RECORD: {"config": config.to_dict(), "modules": len(pairs)},
    }
    _write(_tensors(whole), described, adapter.facts, out)
    return keys


def _common_scale(pairs: Mapping[str, Pair], config: LoraConfig) -> float:
    """The scale of most modules; of several that are as frequent, the config's own, else the least."""
    counts, own = Counter(pair.scale for pair in pairs.values()), config.scale(config.r, config.lora_alpha)
    return max(counts, key=lambda scale: (counts[scale], scale == own, -scale))


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        found |= {f"{path}.lora_a": pair.A.T, f"{path}.lora_b": pair.B.T}
        found |= {f"{path}.m": magnitudes for magnitudes in pair.rows.values()}
    return found


def _other_scale(path: str, own: float, most: float) -> str:
    return (
        f"{path} has the scale {own:.6g} and most have {most:.6g}; mlx has one for all, and as the two "
        "differ by no power of two, lora_b cannot take up the rest without rounding"
    )


def _problems(config: LoraConfig, saved: Collection[str]) -> list[str]:
    return [*beside_pairs(config), *map(_whole, saved)]


def _whole(name: str) -> str:
    if ".base_layer." in name:
        return f"{name} is a copy of the base's; save the adapter with save_embedding_layers=False"
    return f"{name} is saved whole (modules_to_save or bias), and mlx keeps pairs only"


def _pair_problems(pairs: Mapping[str, Pair], base: MlxBase) -> list[str]:
    found = []
    for path, pair in pairs.items():
        found += [
            f"{path} has {key}, for which mlx has no place" for key in pair.rows if MAGNITUDE not in key
        ]
        if pair.A.dim() != 2 or pair.B.dim() != 2:  # noqa: PLR2004
            found.append(f"{path} is no linear layer or embedding")
        if path.rpartition(".")[2] in HEADS and base.tied:
            found.append(
                f"{path}: the head of this base is its embedding, which mlx has no separate layer for"
            )
        if is_embedding(path):
            found += _embedding_problems(path, pair, base)
    return found


def _embedding_problems(path: str, pair: Pair, base: MlxBase) -> list[str]:
    if base.sees_images:
        return [f"{path}: mlx-vlm adapts linear layers only"]
    if pair.rows:
        return [f"{path}: mlx computes DoRA of an embedding for each token, PEFT for each feature"]
    if base.tied:
        return [f"{path}: mlx would adapt the head with it, whose weight it is"]
    return []


def _scaled(pair: Pair, factor: float) -> Pair | None:
    """``pair`` with ``factor`` in its B if that rounds nothing, else None."""
    if factor == 1:
        return pair
    b = pair.B * factor
    exact = math.frexp(factor)[0] == 0.5 and torch.equal(b / factor, pair.B)  # noqa: PLR2004
    return replace(pair, B=b, scale=pair.scale / factor) if exact else None


def _keys(paths: list[str], base: MlxBase) -> tuple[list[str], int]:
    """``keys`` and ``num_layers``: names inside a block where the last so many blocks are adapted alike."""
    found = {path: BLOCK.fullmatch(path) for path in paths}
    blocks: dict[int, set[str]] = {}
    for match in filter(None, found.values()):
        blocks.setdefault(int(match[1]), set()).add(match[2])
    last = range(base.blocks - len(blocks), base.blocks)
    alike = (
        bool(blocks) and sorted(blocks) == [*last] and len({frozenset(own) for own in blocks.values()}) == 1
    )
    if base.sees_images or not alike:
        return sorted(paths), EVERY_BLOCK if base.sees_images else base.blocks
    others = [path for path, match in found.items() if match is None]
    return sorted({*blocks[last[0]], *others}), len(blocks)


def _write(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any], facts: AdapterMetadata, out: Path
) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {out}: {error.strerror}") from error
    weights = save(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    )
    as_json = json.dumps(described, indent=4, sort_keys=True).encode()
    write_whole(out / MLX_WEIGHTS, weights)
    facts.sealed({MLX_WEIGHTS: weights, CONFIG_NAME: as_json}, facts.base).write(out)
    write_whole(out / CONFIG_NAME, as_json)
