"""A base with an adapter merged into it, as the folder of a plain model of transformers."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.errors import MergeError
from rankfold.export.judges import transformers_judge
from rankfold.export.opened import lost_of, open_adapter
from rankfold.export.request import ExportRequest
from rankfold.export.shards import Shards
from rankfold.export.written import Written
from rankfold.files import require_space
from rankfold.models.answering.answers import stops_of
from rankfold.models.base.base import Base
from rankfold.models.base.quiet import quiet_transformers

# The mean divergence, in nats a token, that rounding the merged weights explains.
MOST_KL = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
FOR_BLOCKS = torch.bfloat16  # what GGUF's blocks are written as, unless something else is asked for


def write_merged(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write the base of ``adapter`` with the adapter in it to ``folder``, layer by layer.

    Raises AdapterError, ModelError, MergeError or ConfigError for what is no change of a base's weights."""
    opened = open_adapter(adapter, asked)
    base = opened.base
    numbers = sum(map(prod, opened.shapes.values()))
    require_space(
        folder.parent, numbers * (getattr(torch, asked.dtype) if asked.dtype else FOR_BLOCKS).itemsize
    )
    shards, dtypes = Shards(folder, asked.shard_mb * 10**6), Counter[torch.dtype]()
    lost: dict[str, float] = {}
    with opened.merging() as merging:
        for key, value, held in merging.tensors():
            wanted = getattr(torch, asked.dtype) if asked.dtype else held or FOR_BLOCKS
            written = _in_dtype(key, value, wanted)
            dtypes[written.dtype] += written.numel()
            if merging.change is not None:
                lost[key] = lost_of(merging.change, written)
            shards.add(key, written)
            del value, written
        notes = merging.check_base(asked.allow)
        if merging.untied:
            base.model.config.tie_word_embeddings = False
    shards.finish()
    dtype = dtypes.most_common(1)[0][0]
    _write_text_side(base, folder, dtype)
    name, most = str(dtype).removeprefix("torch."), MOST_KL[dtype]
    return Written(
        partial(transformers_judge, folder),
        name,
        most,
        [*base.notes, *notes],
        lost,
        "--dtype float32 keeps it",
    )


def _in_dtype(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    written = value.to(dtype)
    if dtype != value.dtype and not _is_finite(written) and _is_finite(value):
        raise MergeError(f"{key} has values up to {value.abs().max():.3g}, too large for {dtype}")
    return written


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # no mask of it


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
