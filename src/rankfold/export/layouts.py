"""An adapter under the names, and in the files, that another program loads beside the base."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankfold.errors import ModelError
from rankfold.export.judges import Judge, engine_for, own_judge
from rankfold.export.opened import base_name
from rankfold.export.probes import Probing
from rankfold.export.request import ExportRequest
from rankfold.export.told import said_by
from rankfold.export.written import Written
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.files.adapter_reader import read_weights
from rankfold.lora.files.checkpoint import save_adapter
from rankfold.models.adapters.convert import convert_adapter
from rankfold.models.base.base import Base
from rankfold.models.base.find import find_base
from rankfold.models.base.load import load_base, load_tuned
from rankfold.models.base.precision import Precision
from rankfold.models.internvl.adapter import layout_of_adapter
from rankfold.models.mlx.layout import is_mlx
from rankfold.models.mlx.reading import model_of
from rankfold.peft_surface import PeftModel

MOST_KL = 1e-5  # nats a token: nothing is rounded
MOST_KL_MLX = 1e-3
MLX_THETA = 10000


def write_layout(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write ``adapter`` in the layout that ``asked.to`` names.  Raises what ``convert_adapter`` raises."""
    name = base_of(adapter, asked)
    if asked.to == "hf" and _has_native_names(adapter):
        tensors, facts, _ = read_weights(adapter)
        save_adapter(tensors, LoraConfig.from_pretrained(adapter), folder, facts, facts.base)
        told = [f"{len(tensors)} tensors, under the names that they had"]
    else:
        done = convert_adapter(adapter, folder, asked.to, model=asked.model, common_rank=asked.common_rank)
        named = "keys" if asked.to == "mlx" else "target_modules"
        told = [*done.told, f"{named}: {', '.join(done.target_modules)}"]
    if asked.to == "mlx":
        _refuse_silent_positions(name)
        judge, probing = _by_mlx(folder, asked, name)
        return Written(judge, "float32", MOST_KL_MLX, told, probing=probing)
    return Written(partial(adapter_judge, folder, asked, name), "float32", MOST_KL, told)


def _has_native_names(adapter: Path) -> bool:
    return not is_mlx(adapter) and layout_of_adapter(read_weights(adapter)[0]) == "hf"


def base_of(adapter: Path, asked: ExportRequest) -> str:
    """The name of the base, also of an adapter of mlx's.  Raises ModelError if nothing names it."""
    if asked.model is None and is_mlx(adapter):
        return model_of(adapter) or ""
    return base_name(adapter, LoraConfig.from_pretrained(adapter), asked)


def adapter_judge(folder: Path, asked: ExportRequest, model: str, style: str) -> Judge:
    """PEFT, where it is, and where it knows the names; else our reader."""
    if importlib.util.find_spec("peft") is None or asked.to == "internvl":
        return own_judge(lambda: _tuned(folder, asked, model))
    name = f"peft {importlib.metadata.version('peft')} on our base"
    return Judge(name, lambda told: said_by(_by_peft(folder, model, style), told))


def _tuned(folder: Path, asked: ExportRequest, model: str) -> Base:
    return load_tuned(folder, model, asked.allow, merged=False, precision=Precision.of("float32"))  # type: ignore[arg-type]


def _by_peft(folder: Path, model: str, style: str) -> Base:
    from peft import PeftModel as Theirs

    base = load_base(model, Precision.of("float32"))
    tuned: Any = Theirs.from_pretrained(base.model, str(folder))
    return replace(base, model=tuned.eval(), prompt_style=style)


def _by_mlx(folder: Path, asked: ExportRequest, name: str) -> tuple[Callable[[str], Judge], Probing | None]:
    engine, source = engine_for("mlx-lm", asked.engine_python), find_base(name)
    if engine is None or source.gguf_file is not None or not isinstance(source.location, Path):
        return lambda _: own_judge(lambda: _read_back(folder, asked, name)), None
    location = source.location

    def write(model: PeftModel, place: Path) -> Path:
        model.save_pretrained(place / "own", save_embedding_layers=False)
        return convert_adapter(place / "own", place / "mlx", "mlx", model=name).out

    return lambda style: engine.judge(location, folder, style), Probing(engine, location, write)


def _refuse_silent_positions(name: str) -> None:
    """Raise ModelError for a base of which mlx-lm would take another base of positions without a word."""
    file = Path(find_base(name).location) / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    theta = (told.get("rope_parameters") or {}).get("rope_theta")
    if theta not in (None, MLX_THETA) and "rope_theta" not in told:
        raise ModelError(
            f"{file} has rope_theta in rope_parameters alone, where mlx-lm does not look: it would take "
            f'{MLX_THETA} and say nothing. Add "rope_theta": {theta} to it, or write it by --to merged'
        )


def _read_back(folder: Path, asked: ExportRequest, name: str) -> Base:
    with TemporaryDirectory() as place:
        return _tuned(convert_adapter(folder, Path(place) / "hf", "hf", model=name).out, asked, name)
