"""An adapter alone, as llama.cpp takes it beside its base."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from rankfold.errors import ConfigError
from rankfold.export.judges import Judge, engine_for, own_judge
from rankfold.export.opened import Opened, open_adapter
from rankfold.export.probes import Probing
from rankfold.export.request import ExportRequest
from rankfold.export.written import Written
from rankfold.models.base.base import Base
from rankfold.models.base.load import load_tuned
from rankfold.models.base.precision import Precision
from rankfold.models.gguf.adapter import HEAD, take_gguf_adapter, write_gguf_adapter
from rankfold.models.gguf.file import GgufFile, read_gguf
from rankfold.models.gguf.layout import architecture_of, names_of
from rankfold.peft_surface import PeftModel

ADAPTER = "adapter.gguf"
# What llama.cpp multiplies weights in blocks with is rounded to 8 bits; nats a token, on average.
MOST_KL, MOST_KL_BLOCKS = 2e-4, 2e-2
NUMBERS = ("F32", "F16", "BF16")


def write_gguf_pairs(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write ``adapter.gguf``.  Raises what ``open_adapter`` raises, and AdapterError for what llama.cpp
    has no place for."""
    opened = open_adapter(adapter, asked)
    file = asked.gguf_base or opened.base.source.gguf_file
    base = None if file is None else read_gguf(file, words=False)
    architecture = architecture_of(opened.base.model.config)
    if base is not None and base.architecture != architecture:
        raise ConfigError(f"{file} is a {base.architecture}, and the adapter's base a {architecture}")
    with opened.merging() as merging:
        same = merging.copies()
    tensors = _tensors(opened, architecture, base)
    write_gguf_adapter(opened.tuned, architecture, tensors, folder / ADAPTER, same)
    judge = partial(_judge, opened, asked, folder / ADAPTER, architecture, file)
    kinds = set() if base is None else {tensor.kind for tensor in base.tensors.values()}
    most = MOST_KL if kinds <= {*NUMBERS} else MOST_KL_BLOCKS
    notes = [*opened.base.notes, *_told(file)]
    return Written(judge, "F32", most, notes, probing=_probing(asked, architecture, file, same))


def _tensors(opened: Opened, architecture: str, base: GgufFile | None) -> set[str]:
    if base is not None:
        return {*base.tensors}
    config = opened.base.model.config
    names = {*names_of(architecture, config, opened.shapes)}
    return names - {HEAD} if config.tie_word_embeddings else names


def _judge(
    opened: Opened, asked: ExportRequest, file: Path, architecture: str, base: Path | None, style: str
) -> Judge:
    engine = engine_for("llama.cpp", asked.engine_python)
    if engine is not None and base is not None:
        return engine.judge(base, file, style)
    return own_judge(lambda: _read_back(opened, asked, file, architecture))


def _read_back(opened: Opened, asked: ExportRequest, file: Path, architecture: str) -> Base:
    allow, precision = asked.allow, Precision.of("float32")
    tuned = load_tuned(opened.adapter, asked.model, allow, merged=False, precision=precision)  # type: ignore[arg-type]
    take_gguf_adapter(tuned.model, architecture, file)
    return tuned


def _probing(
    asked: ExportRequest, architecture: str, file: Path | None, same: Collection[str]
) -> Probing | None:
    engine = engine_for("llama.cpp", asked.engine_python)
    if engine is None or file is None:
        return None
    tensors = {*read_gguf(file, words=False).tensors}

    def write(model: PeftModel, folder: Path) -> Path:
        write_gguf_adapter(model, architecture, tensors, folder / ADAPTER, same)
        return folder / ADAPTER

    return Probing(engine, file, write)


def _told(file: Path | None) -> list[str]:
    if file is None:
        return ["it was not tried in llama.cpp: name the base as a GGUF file with --gguf-base"]
    return []
