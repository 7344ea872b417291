"""A base without its weights: built from its config on torch's meta device, to be counted and planned for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rankfold.errors import ModelError
from rankfold.models.base.base import Base
from rankfold.models.base.find import BaseSource, cannot_load, find_base
from rankfold.models.base.fitting import TOKENIZER_FILES
from rankfold.models.base.image_text import config_without_files, original_config_of, processor_with
from rankfold.models.base.processors import sees_images
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.base.text_side import text_side

CONFIG_NAME = "config.json"


def load_outline(name: str, tokenizer_from: str | None = None) -> Base:
    """The model that ``name`` (see ``find_base``, or a ``config.json``) describes, without its weights.

    Its tokenizer, and its processor if it sees images, come from beside the config or from
    ``tokenizer_from``; they are None where there is none.  Raises ModelError."""
    source = find_config(name)
    side = None if source.gguf_file is None else text_side(source)
    config = _config(source) if side is None else side.config
    if side is not None and tokenizer_from is None:
        return Base(_on_meta(source, config), side.tokenizer, source, side.notes)
    tokenizer, processor, notes = _text_side(source, tokenizer_from, config)
    notes += [] if side is None else side.notes
    return Base(_on_meta(source, config), tokenizer, source, notes, processor=processor)


def find_config(name: str) -> BaseSource:
    """Where a config is read: ``find_base``'s places, and a JSON file by its path.  Raises ModelError."""
    path = Path(name).expanduser()
    if path.suffix != ".json":
        return find_base(name)
    if not path.is_file():
        raise ModelError(f"no such config: {name}")
    if path.name != CONFIG_NAME:
        raise ModelError(f"{name}: a model's config is called {CONFIG_NAME}; name that, or its folder")
    return BaseSource(name, path.parent, f"config {name}")


def is_described_only(source: BaseSource) -> bool:
    """Whether the place holds a config and no tokenizer."""
    folder = source.location
    if not isinstance(folder, Path) or source.gguf_file is not None:
        return False
    return not any((folder / file).is_file() for file in TOKENIZER_FILES)


def _config(source: BaseSource) -> Any:
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            if (original := original_config_of(source)) is not None:
                return config_without_files(original)
            return AutoConfig.from_pretrained(source.location, trust_remote_code=False)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{source.name}: the config is not JSON: {error}") from error
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def _on_meta(source: BaseSource, config: Any) -> Any:
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        kind: Any = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # a config may ask for anything
            raise cannot_load(source.location, source.name, error) from error
    model.name_or_path = source.name
    return model


def _text_side(source: BaseSource, given: str | None, config: Any) -> tuple[Any, Any, list[str]]:
    """Tokenizer, processor, and what a user should know of them."""
    if given is None and is_described_only(source):
        return None, None, []
    if given is not None and not Path(given).is_dir():
        raise ModelError(f"--tokenizer {given}: no such folder")
    location = source.location if given is None else Path(given)
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            if source.gguf_file is None and sees_images(config):
                processor = processor_with(source, config, location)
                return processor.tokenizer, processor, []
            return AutoTokenizer.from_pretrained(location, trust_remote_code=False), None, []
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(location, given or source.name, error) from error
