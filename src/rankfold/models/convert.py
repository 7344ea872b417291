"""Converting an adapter of InternVL to the layout that another program loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from rankfold.errors import AdapterError, ConfigError, ModelError, OutputError, nearest
from rankfold.lora import LoraConfig
from rankfold.lora.checkpoint import save_adapter
from rankfold.lora.stored import read_weights
from rankfold.lora.targets import module_names
from rankfold.models.find import find_base
from rankfold.models.image_text import image_text_config, original_config_of
from rankfold.models.internvl.adapter import LayoutName, Translated, layout_of_adapter, translate
from rankfold.models.internvl.config import NATIVE_TYPE, is_internlm2, layout_of
from rankfold.models.quiet import quiet_transformers

LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)


@dataclass(frozen=True)
class Conversion:
    """A converted adapter's folder and targets; ``told`` says what was done, error included."""

    out: Path
    target_modules: list[str]
    told: list[str]


def convert_adapter(
    adapter: Path, out: Path, layout: str, *, model: str | None = None, common_rank: int | None = None
) -> Conversion:
    """Write ``adapter`` to ``out`` in the ``layout`` "internvl", the original's, or "hf", transformers'.

    ``model`` is the base if the adapter does not name it; only its config is read.  See ``translate`` for
    ``common_rank``.  Raises AdapterError, ModelError, ConfigError or OutputError."""
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}{nearest(layout, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
    if common_rank is not None and common_rank < 1:
        raise ConfigError(f"common_rank must be at least 1, got {common_rank}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; name another")
    config = LoraConfig.from_pretrained(adapter)
    tensors, facts, faults = read_weights(adapter)
    if faults:
        raise AdapterError(f"{adapter}: {faults[0][1]}")
    if layout_of_adapter(tensors) == layout:
        raise AdapterError(f"{adapter} is in the layout {layout!r} already")
    name = model or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to; name it with --model")
    native, internlm2 = _base(name)
    modules = _native_modules(native)
    translated = translate(tensors, config, layout_of(native.to_dict(), internlm2), modules, common_rank)
    save_adapter(translated.tensors, translated.config, out, facts, facts.base)
    targets = list(translated.config.target_modules or ())
    return Conversion(out, targets, _told(translated, layout, common_rank))


@contextmanager
def natively_named(adapter: Path, model: str) -> Iterator[Path]:
    """The folder of ``adapter`` if transformers' names are in it, else one that is converted for as long as
    the block lasts.  Raises AdapterError or ModelError."""
    if layout_of_adapter(read_weights(adapter)[0]) == "hf":
        yield adapter
        return
    with TemporaryDirectory() as folder:
        yield convert_adapter(adapter, Path(folder) / "native", "hf", model=model).out


def _base(name: str) -> tuple[Any, bool | None]:
    """The native config of the base, and whether the original is InternLM2, if it is known."""
    source = find_base(name)
    native = None if source.gguf_file is not None else image_text_config(source)
    if native is None or native.model_type != NATIVE_TYPE:
        raise ModelError(f"{name} is no InternVL, and only InternVL has two layouts")
    original = original_config_of(source)
    return native, None if original is None else is_internlm2(original)


def _native_modules(config: Any) -> Sequence[str]:
    with quiet_transformers(), torch.device("meta"):
        from transformers import InternVLForConditionalGeneration

        return module_names(InternVLForConditionalGeneration(config))


def _told(translated: Translated, layout: str, common_rank: int | None) -> list[str]:
    told = [f"{len(translated.tensors)} tensors in the layout {layout}"]
    if layout == "hf":
        return [*told, "queries, keys and values share their A; exact"]
    for rank, count in sorted(translated.joined.items()):
        told.append(f"{count} fused matrices of rank {rank}")
    if not translated.errors:
        return [*told, "exact"]
    worst = max(translated.errors, key=lambda name: translated.errors[name])
    mean = sum(translated.errors.values()) / len(translated.errors)
    told.append(
        f"{len(translated.errors)} of them brought down to rank {common_rank} by SVD: relative error "
        f"{mean:.2e} on average, {translated.errors[worst]:.2e} at most ({worst})"
    )
    return told
