"""An adapter on its base, whose weights are not read yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from rankfold.errors import AdapterError, ConfigError, ModelError, bullet_list
from rankfold.export.merging import Merging, on_zeros
from rankfold.export.request import ExportRequest
from rankfold.lora.config.lora_config import LoraConfig, changes_base
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import read_weights
from rankfold.models.base.base import Base
from rankfold.models.base.contents import checkpoint_of
from rankfold.models.base.fitting import fit_to_adapter
from rankfold.models.base.meta_model import load_outline
from rankfold.peft_surface import PeftModel


@dataclass(frozen=True)
class Opened:
    """``base`` with the tokenizer that the adapter brings, and ``tuned``, its model with the adapter on it;
    all weights of the base are zeros that take no memory.  ``shapes`` are those of its own parameters."""

    adapter: Path
    base: Base
    tuned: PeftModel
    shapes: Mapping[str, tuple[int, ...]]

    @contextmanager
    def merging(self) -> Iterator[Merging]:
        """The weights of the base with the adapter in them."""
        with checkpoint_of(self.base.source, self.base.model) as checkpoint:
            yield Merging(self.tuned, checkpoint, read_weights(self.adapter)[0])


def open_adapter(adapter: Path, asked: ExportRequest) -> Opened:
    """Raises AdapterError, ModelError or ConfigError, also for what is no change of a base's weights."""
    config = LoraConfig.from_pretrained(adapter)
    base = _base_of(adapter, config, asked)
    shapes = {name: tuple(parameter.shape) for name, parameter in base.model.named_parameters()}
    return Opened(adapter, base, on_zeros(base.model, adapter, asked.allow), shapes)


def base_name(adapter: Path, config: LoraConfig, asked: ExportRequest) -> str:
    """Raises ModelError if nothing names the base."""
    name = asked.model or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to; name it with --model")
    return name


def lost_of(change: tuple[Tensor, Tensor], written: Tensor) -> float:
    """How far ``written`` is from the changed weight, to the length of the change: (before, after)."""
    before, after = change
    length = float((after - before).norm())
    return float((written.to(after.dtype) - after).norm()) / length if length else 0.0


def _base_of(adapter: Path, config: LoraConfig, asked: ExportRequest) -> Base:
    problems = {
        f"init_lora_weights={config.init_lora_weights!r} changed the base weights before training; save it "
        "with path_initial_model_for_weight_conversion first": changes_base(config.init_lora_weights),
        "KaSA changes the base": config.kasa_config is not None,
        "layer_replication makes another model of the base": config.layer_replication is not None,
    }
    if told := [text for text, holds in problems.items() if holds]:
        raise AdapterError(bullet_list(f"{adapter} cannot be written layer by layer:", told))
    name = base_name(adapter, config, asked)
    outline = load_outline(name)
    if outline.processor is not None:
        raise ConfigError(f"{name} sees images, and only language models are exported so far")
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
