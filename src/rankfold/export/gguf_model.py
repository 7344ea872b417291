"""A base with an adapter merged into it, as one GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankfold.errors import ModelError, bullet_list
from rankfold.export.judges import Judge, engine_for, own_judge
from rankfold.export.merging import Merging
from rankfold.export.opened import open_adapter
from rankfold.export.request import ExportRequest
from rankfold.export.written import Written
from rankfold.files import require_space
from rankfold.models.answering.answers import stops_of
from rankfold.models.base.load import load_base
from rankfold.models.gguf.config import gguf_config
from rankfold.models.gguf.config_keys import not_said
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.layout import GgufLayout
from rankfold.models.gguf.writing import (
    FILE_TYPES,
    INSTEAD,
    Key,
    Planned,
    can_make,
    gguf_writer,
    kind_for,
    stored_numbers,
)

MODEL = "model.gguf"
# The mean divergence, in nats a token, that the rounding of weights, and llama.cpp's of what is multiplied
# with them, explains.
MOST_KL = {"F32": 2e-4, "F16": 2e-4, "BF16": 2e-2, "Q8_0": 2e-2}
MOST_KL_BLOCKS = 1.0  # of fewer bits: what counts is what is left of what was learnt


def write_gguf_model(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write ``model.gguf``.  Raises what ``open_adapter`` and ``GgufLayout.of`` raise, and MergeError."""
    opened = open_adapter(adapter, asked)
    base = opened.base
    layout = GgufLayout.of(base, opened.shapes).answering(base, stops_of(base))
    lost: dict[str, float] = {}
    with opened.merging() as merging:
        if merging.untied:
            layout = layout.with_parameters(merging.untied)
            base.model.config.tie_word_embeddings = False
        planned = _planned(layout, merging, opened.shapes, asked.type)
        require_space(folder.parent, sum(each.size for each in planned))
        kinds = Counter[str]()
        for each in planned:
            kinds[each.kind] += prod(each.shape)
        most = kinds.most_common(1)[0][0]
        keys = dict(layout.keys)
        if asked.type or layout.file is None:
            keys["general.file_type"] = Key.of(FILE_TYPES[most])
        keys.setdefault("general.quantization_version", Key.of(2))
        with gguf_writer(folder / MODEL, layout.architecture, keys, planned) as writer:
            for data in _data(layout, merging, planned, lost):
                writer.write_tensor_data(data)
        notes = [*base.notes, *_check(folder / MODEL, layout)]
        notes += [*merging.check_base(asked.allow), *_told_of_kinds(layout, planned)]
    judge = partial(gguf_judge, folder / MODEL, asked)
    remedy = "--type F16 keeps it, and so does --to gguf-adapter"
    return Written(judge, most, MOST_KL.get(most, MOST_KL_BLOCKS), notes, lost, remedy)


def _check(path: Path, layout: GgufLayout) -> list[str]:
    """Raise ModelError if a config says what its file does not; tell of a window, which counts in texts that
    are longer than it."""
    if layout.file is not None:
        return []
    read, _ = gguf_config(read_gguf(path, words=False), {})
    if told := not_said(layout.config, read):
        raise ModelError(bullet_list(f"GGUF has no words for all of this {layout.config.model_type}:", told))
    window = getattr(layout.config, "sliding_window", None)
    if window is None or hasattr(read, "sliding_window"):
        return []
    return [f"llama.cpp does not read sliding_window = {window}: longer texts are another matter there"]


def gguf_judge(model: Path, asked: ExportRequest, style: str) -> Judge:
    """llama.cpp, where it is; else our reader."""
    engine = engine_for("llama.cpp", asked.engine_python)
    if engine is not None:
        return engine.judge(model, None, style)
    return own_judge(lambda: replace(load_base(str(model)), prompt_style=style))


def _planned(
    layout: GgufLayout, merging: Merging, shapes: Mapping[str, tuple[int, ...]], wanted: str | None
) -> list[Planned]:
    """All tensors, in the order of the base's file if it is one of GGUF."""
    own = wanted or (_own_kind(merging) if layout.file is None else INSTEAD)
    planned = []
    for tensor, parameter in layout.names.items():
        shape = next(shapes[name] for name in merging.groups[parameter] if name in shapes)
        kind = layout.kinds.get(tensor) if wanted is None else None
        if kind is None or (merging.is_touched(parameter) and not can_make(kind)):
            kind = kind_for(tensor, shape, own)
        planned.append(Planned(tensor, shape, kind))
    apart = [Planned(name, data.shape, "F32") for name, data in layout.apart.items()]
    return [*planned, *apart]


def _data(
    layout: GgufLayout, merging: Merging, planned: list[Planned], lost: dict[str, float]
) -> Iterator[np.ndarray[Any, Any]]:
    """What is written of each tensor; bit by bit what is in the base's file where nothing touches it."""
    for each in planned:
        parameter = layout.names.get(each.name)
        is_same = layout.kinds.get(each.name) == each.kind
        if parameter is None:
            yield layout.apart[each.name]
        elif layout.file is not None and is_same and not merging.is_touched(parameter):
            yield layout.file.data(each.name)
        else:
            value = merging.value(parameter)
            before = None if merging.change is None else merging.change[0]
            data, rounding = stored_numbers(value, each, layout.rules, layout.config, before)
            if before is not None:
                lost[parameter] = rounding.lost
            yield data


def _own_kind(merging: Merging) -> str:
    """GGUF's type of the same numbers as the base's files have."""
    _, read = next(iter(merging.checkpoint.values()))
    return {torch.float16: "F16", torch.float32: "F32"}.get(read().data.dtype, "BF16")


def _told_of_kinds(layout: GgufLayout, planned: list[Planned]) -> list[str]:
    other = {
        f"{layout.kinds[each.name]} as {each.kind}"
        for each in planned
        if each.name in layout.kinds and not can_make(layout.kinds[each.name])
        if each.kind != layout.kinds[each.name]
    }
    if not other:
        return []
    return [
        f"matrices of the base's file that the adapter changes are written anew: {', '.join(sorted(other))}"
    ]
