"""An adapter as servers take it beside the base: one rank, one scale, modules by the end of their names.

vLLM, SGLang and lmdeploy read PEFT's files, and of the config little more than ``r``, ``lora_alpha`` and
``target_modules``; what else is in it they pass over, some of it without a word."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from rankfold.errors import AdapterError, ConfigError, bullet_list
from rankfold.export.layouts import adapter_judge, base_of
from rankfold.export.request import ExportRequest
from rankfold.export.written import Written
from rankfold.files import write_whole
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.files.adapter_reader import read_weights
from rankfold.lora.files.checkpoint import save_adapter
from rankfold.lora.files.lora_weights import (
    Pair,
    beside_pairs,
    is_embedding,
    padded,
    pair_of,
    pair_tensors,
    sorted_out,
)
from rankfold.models.base.find import find_base
from rankfold.models.messages.plain_template import plain_template

MATRIX = 2
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
HEADS = ("lm_head", "output")
MOST_KL = 1e-5
TEMPLATE = "chat_template.jinja"


def write_served(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write ``adapter`` as ``asked.to`` serves it, with the command that does.

    Exact but for a scale that goes into B, in float32.  Raises AdapterError for what the server would refuse
    or pass over, ConfigError for a base that it cannot read."""
    config, name = LoraConfig.from_pretrained(adapter), base_of(adapter, asked)
    if find_base(name).gguf_file is not None:
        raise ConfigError(
            f"{asked.to} reads a model's folder, and {name} is a GGUF file; name one with --model"
        )
    tensors, facts, faults = read_weights(adapter)
    if faults:
        raise AdapterError(f"{adapter}: {faults[0][1]}")
    modules = sorted_out(tensors)
    pairs = {path: pair_of(path, own, config) for path, own in modules.pairs.items()}
    if problems := [*beside_pairs(config), *map(_whole, modules.saved), *_of_pairs(pairs)]:
        text = f"{asked.to} would refuse or pass over parts of this adapter; --to merged is a way out:"
        raise AdapterError(bullet_list(text, problems))
    rank = max(pair.rank for pair in pairs.values())
    if asked.to == "vllm":
        rank = next((step for step in VLLM_RANKS if step >= rank), rank)
        if rank > VLLM_RANKS[-1]:
            raise AdapterError(
                f"the rank is {rank}, and vLLM's highest {VLLM_RANKS[-1]}: merge it (--to merged)"
            )
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({path.rpartition(".")[2] for path in pairs}),
        base_model_name_or_path=name,
        task_type=config.task_type,
        inference_mode=True,
    )
    written = {
        key: tensor
        for path, pair in pairs.items()
        for key, tensor in pair_tensors(path, padded(_unscaled(pair), rank)).items()
    }
    save_adapter(written, plain, folder, facts, facts.base)
    template = facts.chat_template
    if template:
        write_whole(folder / TEMPLATE, plain_template(template))
    told = [_told_of(pairs, rank), f"serve it: {serving(asked.to, name, rank, bool(template))}"]
    return Written(partial(adapter_judge, folder, asked, name), "float32", MOST_KL, told)


def serving(engine: str, model: str, rank: int, has_template: bool) -> str:
    """The command that serves the folder, which is called ADAPTER in it."""
    words = {
        "vllm": ["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"],
        "sglang": [
            *("python", "-m", "sglang.launch_server", "--model-path", model, "--enable-lora"),
            *("--max-lora-rank", str(rank), "--lora-paths"),
        ],
        "lmdeploy": ["lmdeploy", "serve", "api_server", model, "--backend", "pytorch", "--adapters"],
    }[engine]
    template = ["--chat-template", f"ADAPTER/{TEMPLATE}"] if has_template else []
    return shlex.join([*words, "NAME=ADAPTER", *template])


def _unscaled(pair: Pair) -> Pair:
    return replace(pair, B=(pair.B.float() * pair.scale).contiguous(), A=pair.A.float(), scale=1.0)


def _whole(name: str) -> str:
    return f"{name} is saved whole (modules_to_save, bias or an embedding's own rows)"


def _of_pairs(pairs: Mapping[str, Pair]) -> list[str]:
    found = [] if pairs else ["it adapts no module"]
    for path, pair in pairs.items():
        found += [f"{path} has {key}" for key in pair.rows]
        if pair.A.dim() != MATRIX or pair.B.dim() != MATRIX:
            found.append(f"{path} is no linear layer")
        elif is_embedding(path) or path.rpartition(".")[2] in HEADS:
            found.append(f"{path} holds the words, on which not all versions put a pair")
        if not torch.isfinite(pair.B.float() * pair.scale).all():
            found.append(f"{path} has numbers that are not finite")
    return found


def _told_of(pairs: Mapping[str, Pair], rank: int) -> str:
    ranks, scales = {pair.rank for pair in pairs.values()}, {pair.scale for pair in pairs.values()}
    told = [f"{len(pairs)} pairs of rank {rank}"]
    if ranks != {rank}:
        told.append(f"those of {', '.join(map(str, sorted(ranks - {rank})))} filled up with zeros")
    if scales != {1.0}:
        told.append("their scale in B")
    return ", ".join(told)
