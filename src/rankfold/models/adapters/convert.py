"""Converting an adapter to the layout that another program loads."""

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
from rankfold.lora.files.adapter_reader import read_weights
from rankfold.lora.files.checkpoint import save_adapter
from rankfold.lora.placing.targets import module_names
from rankfold.models.base.find import find_base
from rankfold.models.base.image_text import image_text_config, original_config_of
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.base.text_side import text_config
from rankfold.models.internvl.adapter import (
    LayoutName,
    Translated,
    layout_of_adapter,
    original_names,
    translate,
)
from rankfold.models.internvl.config import NATIVE_TYPE, is_internlm2, layout_of
from rankfold.models.internvl.names import Layout
from rankfold.models.mlx.layout import NATIVE_NAMES, TEXT_TYPES, MlxBase, Unpacked, is_mlx
from rankfold.models.mlx.reading import model_of, read_mlx
from rankfold.models.mlx.writing import write_mlx

LAYOUTS: tuple[str, ...] = (*get_args(LayoutName), "mlx")
NO_OTHER_LANGUAGE = (
    "mlx-vlm runs InternVL on Qwen's language models only: nothing there loads this base yet, and the names "
    "are those that a port would keep"
)


@dataclass(frozen=True)
class Conversion:
    """A converted adapter's folder and targets; ``told`` says what was done, error included."""

    out: Path
    target_modules: list[str]
    told: list[str]


@dataclass(frozen=True)
class _Target:
    """A base: transformers' config, what mlx must know of it, and the other two layouts if it is InternVL.

    ``own``: the layout that the base's own checkpoint is in."""

    config: Any
    mlx: MlxBase
    own: LayoutName
    layout: Layout | None = None
    note: str = ""


def convert_adapter(
    adapter: Path, out: Path, layout: str, *, model: str | None = None, common_rank: int | None = None
) -> Conversion:
    """Write ``adapter`` to ``out`` in another ``layout``: "hf", transformers'; "internvl", that of an
    InternVL in its original layout; or "mlx", that of mlx-lm and mlx-vlm.

    ``model`` is the base if the adapter does not name it; only its config is read.  See ``translate`` for
    ``common_rank``.  Raises AdapterError, ModelError, ConfigError or OutputError."""
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}{nearest(layout, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
    if common_rank is not None and common_rank < 1:
        raise ConfigError(f"common_rank must be at least 1, got {common_rank}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; name another")
    from_mlx = is_mlx(adapter)
    source = None if from_mlx else _read(adapter)
    before: str = "mlx" if source is None else layout_of_adapter(source.tensors)
    if before == layout:
        raise AdapterError(f"{adapter} is in the layout {layout!r} already")
    name = model or (model_of(adapter) if source is None else source.config.base_model_name_or_path)
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to; name it with --model")
    base = _base(name, to_or_from_mlx="mlx" in (before, layout))
    names = _names(base)
    if source is None:
        known = names if base.own == "hf" or base.layout is None else original_names(names, base.layout)
        source = read_mlx(adapter, base.mlx, known)
    return _Converter(base, names, common_rank).go(source, layout, out)


@dataclass
class _Converter:
    """One conversion: to the layout of the base's own checkpoint where mlx needs that, and on."""

    base: _Target
    names: Sequence[str]
    common_rank: int | None

    def go(self, source: Unpacked, layout: str, out: Path) -> Conversion:
        told: list[str] = []
        wanted = self.base.own if layout == "mlx" else layout
        if layout_of_adapter(source.tensors) != wanted:
            source, told = self._translated(source, wanted)
        if layout == "mlx":
            keys = write_mlx(source, self.base.mlx, out)
            return Conversion(out, keys, [*told, *self._told_of_mlx(source)])
        save_adapter(source.tensors, source.config, out, source.facts, source.facts.base)
        first = [] if told else [f"{len(source.tensors)} tensors in the layout {layout}", "exact"]
        return Conversion(out, sorted(source.config.target_modules or ()), [*first, *told])

    def _translated(self, source: Unpacked, wanted: str) -> tuple[Unpacked, list[str]]:
        if self.base.layout is None:
            raise ModelError(
                f"{self.base.config.model_type} is no InternVL, and only InternVL has two layouts"
            )
        done = translate(source.tensors, source.config, self.base.layout, self.names, self.common_rank)
        return Unpacked(done.tensors, done.config, source.facts), _told(done, wanted, self.common_rank)

    def _told_of_mlx(self, source: Unpacked) -> list[str]:
        ranks = {
            len(t) for key, t in source.tensors.items() if key.endswith(("lora_A.weight", "embedding_A"))
        }
        told = [f"{len(source.tensors)} tensors in the layout mlx"]
        if len(ranks) > 1:
            told.append(f"ranks from {min(ranks)} to {max(ranks)}, filled with zeros to {max(ranks)}")
        return [*told, *filter(None, [self.base.note]), "exact"]


def _read(adapter: Path) -> Unpacked:
    config = LoraConfig.from_pretrained(adapter)
    tensors, facts, faults = read_weights(adapter)
    if faults:
        raise AdapterError(f"{adapter}: {faults[0][1]}")
    return Unpacked(tensors, config, facts)


@contextmanager
def natively_named(adapter: Path, model: str) -> Iterator[Path]:
    """The folder of ``adapter`` if transformers' names are in it, else one that is converted for as long as
    the block lasts.  Raises AdapterError or ModelError."""
    if layout_of_adapter(read_weights(adapter)[0]) == "hf":
        yield adapter
        return
    with TemporaryDirectory() as folder:
        yield convert_adapter(adapter, Path(folder) / "native", "hf", model=model).out


def _base(name: str, *, to_or_from_mlx: bool) -> _Target:
    """What of the base is to be known.  Raises ModelError for one that the layout is not for."""
    source = find_base(name)
    native = None if source.gguf_file is not None else image_text_config(source)
    if native is not None and native.model_type == NATIVE_TYPE:
        original = original_config_of(source)
        return _internvl(native, original)
    if not to_or_from_mlx:
        raise ModelError(f"{name} is no InternVL, and only InternVL has two layouts")
    config = native or text_config(source)
    if config.model_type not in TEXT_TYPES:
        raise ModelError(
            f"{name} is a {config.model_type}, whose modules may be called otherwise in mlx; known are those "
            f"of InternVL and of {', '.join(TEXT_TYPES)}"
        )
    return _Target(config, MlxBase(config.num_hidden_layers, bool(config.tie_word_embeddings)), "hf")


def _internvl(native: Any, original: dict[str, Any] | None) -> _Target:
    internlm2 = None if original is None else is_internlm2(original)
    text = native.get_text_config()
    renamed = NATIVE_NAMES if original is None else {}
    mlx = MlxBase(text.num_hidden_layers, bool(native.tie_word_embeddings), sees_images=True, renamed=renamed)
    note = "" if text.model_type.startswith("qwen") else NO_OTHER_LANGUAGE
    own: LayoutName = "hf" if original is None else "internvl"
    return _Target(native, mlx, own, layout_of(native.to_dict(), internlm2), note)


def _names(base: _Target) -> Sequence[str]:
    """The names of the base's modules, by its class in transformers."""
    with quiet_transformers(), torch.device("meta"):
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        kind: Any = AutoModelForImageTextToText if base.mlx.sees_images else AutoModelForCausalLM
        return module_names(kind.from_config(base.config))


def _told(translated: Translated, layout: str, common_rank: int | None) -> list[str]:
    told = [f"{len(translated.tensors)} tensors in the layout {layout}"]
    if layout == "hf":
        return [*told, "queries, keys and values share their A; exact"]
    for rank, count in sorted(translated.joined.items()):
        told.append(f"{count} fused matrices of rank {rank}")
    ranks = {*translated.config.rank_pattern.values(), translated.config.r}
    if len(ranks) > 1:
        told.append(
            f"ranks from {min(ranks)} to {max(ranks)}; lmdeploy knows one only: --common-rank {max(ranks)} "
            "fills the others up, exactly"
        )
    if not translated.errors:
        return [*told, "exact"]
    worst = max(translated.errors, key=lambda name: translated.errors[name])
    mean = sum(translated.errors.values()) / len(translated.errors)
    told.append(
        f"{len(translated.errors)} of them brought down to rank {common_rank} by SVD: relative error "
        f"{mean:.2e} on average, {translated.errors[worst]:.2e} at most ({worst})"
    )
    return told
