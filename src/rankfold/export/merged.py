"""A base with an adapter merged into it, as the folder of a plain model of transformers."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import AdapterError, ConfigError, MergeError, ModelError, bullet_list
from rankfold.export.merging import Merging, on_zeros
from rankfold.export.request import ExportRequest
from rankfold.export.shards import Shards
from rankfold.files import require_space
from rankfold.lora.config.lora_config import LoraConfig, changes_base
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import read_weights
from rankfold.models.answering.answers import stops_of
from rankfold.models.base.base import Base
from rankfold.models.base.contents import checkpoint_of
from rankfold.models.base.fitting import fit_to_adapter
from rankfold.models.base.meta_model import load_outline
from rankfold.models.base.quiet import quiet_transformers

FOR_BLOCKS = torch.bfloat16  # what GGUF's blocks are written as, unless something else is asked for


@dataclass(frozen=True)
class Written:
    """The dtype of most weights; by the weight's key, how far what is written is from the adapter's change,
    to its length; what should be known."""

    dtype: torch.dtype
    lost: dict[str, float]
    notes: list[str]


def write_merged(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write the base of ``adapter`` with the adapter in it to ``folder``, layer by layer.

    Raises AdapterError, ModelError, MergeError or ConfigError for what is no change of a base's weights."""
    config = LoraConfig.from_pretrained(adapter)
    base = _base_of(adapter, config, asked)
    numbers = sum(parameter.numel() for parameter in base.model.parameters())
    require_space(
        folder.parent, numbers * (getattr(torch, asked.dtype) if asked.dtype else FOR_BLOCKS).itemsize
    )
    tuned = on_zeros(base.model, adapter, asked.allow)
    shards, dtypes = Shards(folder, asked.shard_mb * 10**6), Counter[torch.dtype]()
    lost: dict[str, float] = {}
    with checkpoint_of(base.source, base.model) as checkpoint:
        merging = Merging(tuned, checkpoint, read_weights(adapter)[0])
        for key, value, held in merging.tensors():
            wanted = getattr(torch, asked.dtype) if asked.dtype else held or FOR_BLOCKS
            written = _in_dtype(key, value, wanted)
            dtypes[written.dtype] += written.numel()
            if merging.change is not None:
                lost[key] = _lost(*merging.change, written)
            shards.add(key, written)
        notes = merging.check_base(asked.allow)
        if merging.untied:
            base.model.config.tie_word_embeddings = False
    shards.finish()
    dtype = dtypes.most_common(1)[0][0]
    _write_text_side(base, folder, dtype)
    return Written(dtype, lost, [*base.notes, *notes])


def _base_of(adapter: Path, config: LoraConfig, asked: ExportRequest) -> Base:
    name = asked.model or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to; name it with --model")
    problems = {
        f"init_lora_weights={config.init_lora_weights!r} changed the base weights before training; save it "
        "with path_initial_model_for_weight_conversion first": changes_base(config.init_lora_weights),
        "KaSA changes the base": config.kasa_config is not None,
        "layer_replication makes another model of the base": config.layer_replication is not None,
    }
    if told := [text for text, holds in problems.items() if holds]:
        raise AdapterError(bullet_list(f"{adapter} cannot be written layer by layer:", told))
    outline = load_outline(name)
    if outline.processor is not None:
        raise ConfigError(f"{name} sees images, and only language models are merged so far")
    fitted = fit_to_adapter(
        replace(outline, model=None),
        adapter,
        AdapterMetadata.read(adapter),
        asked.allow,  # type: ignore[arg-type]
    )
    rows = outline.model.get_input_embeddings().weight.shape[0]
    if len(fitted.tokenizer) > rows:
        raise AdapterError(
            f"the adapter brings {len(fitted.tokenizer):,} words, and the base embeds {rows:,}: give it "
            "their rows first (resize_token_embeddings, save_pretrained) and name that with --model"
        )
    outline.model.tie_weights()
    return replace(fitted, model=outline.model)


def _in_dtype(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    written = value.to(dtype)
    if not torch.isfinite(written).all() and torch.isfinite(value).all():
        raise MergeError(f"{key} has values up to {value.abs().max():.3g}, too large for {dtype}")
    return written


def _lost(before: Tensor, after: Tensor, written: Tensor) -> float:
    """How far ``written`` is from ``after``, to the length of the change from ``before``."""
    length = float((after - before).norm())
    return float((written.to(after.dtype) - after).norm()) / length if length else 0.0


def _write_text_side(base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer with template, and what ends an answer, so that older readers find them too."""
    from transformers import GenerationConfig

    model, source = base.model, base.source
    model.config.dtype = dtype
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if source.gguf_file is None:
            with suppress(OSError):  # a folder need not have one
                model.generation_config = GenerationConfig.from_pretrained(source.location)
        model.generation_config.eos_token_id = sorted(stops_of(base))
        model.generation_config.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    _add(folder / "config.json", older_words(json.loads((folder / "config.json").read_text())))
    if template := base.tokenizer.chat_template:
        _add(folder / "tokenizer_config.json", {"chat_template": template})


def older_words(config: dict[str, Any]) -> dict[str, Any]:
    """What readers before transformers 5, and mlx-lm, look for under other names.  Without ``rope_theta``
    some take 10,000 and say nothing."""
    rope = config.get("rope_parameters") or {}
    words: dict[str, Any] = {"torch_dtype": config.get("dtype")}
    if "rope_theta" in rope:
        words["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            words["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {key: value for key, value in words.items() if key not in config}


def _add(file: Path, words: dict[str, Any]) -> None:
    file.write_text(
        json.dumps({**json.loads(file.read_text()), **words}, indent=2, ensure_ascii=False) + "\n"
    )
