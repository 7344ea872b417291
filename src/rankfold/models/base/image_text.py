"""Base models that see images: transformers' own, and InternVL's original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankfold.errors import ModelError
from rankfold.models.base.find import BaseSource, cannot_load
from rankfold.models.base.packed import held_model
from rankfold.models.base.processors import load_processor, sees_images
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.choices import Stored
from rankfold.models.internvl.chat import NO_PROMPT, SYSTEM_PROMPT
from rankfold.models.internvl.config import (
    NATIVE_TYPE,
    is_internlm2,
    is_original,
    layout_of,
    native_config,
)
from rankfold.models.internvl.loading import (
    end_turns,
    image_processor_of,
    load_original,
    load_original_processor,
    native_config_of,
)

# What a model of the original layout needs of a hub repository: none of its Python files.
ORIGINAL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
ORIGINAL_TEXT_FILES = ("*.json", "*.model", "*.txt")
NATIVE_TILES = {"dynamic_image_size": True, "max_dynamic_patch": 12}  # where only a native config is there


def image_text_config(source: BaseSource) -> Any:
    """The native config of a model that sees images; None for any other.  Raises ModelError."""
    with quiet_transformers():
        from transformers import AutoConfig, PreTrainedConfig

        try:
            described, _ = PreTrainedConfig.get_config_dict(source.location)
            if is_original(described):
                return native_config_of(_folder(source, ORIGINAL_TEXT_FILES))
            config = AutoConfig.from_pretrained(source.location)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error
    return config if sees_images(config) else None


def original_config_of(source: BaseSource) -> dict[str, Any] | None:
    """The ``config.json`` of a model in InternVL's original layout; None for any other."""
    from transformers import PreTrainedConfig

    described, _ = PreTrainedConfig.get_config_dict(source.location)
    return dict(described) if is_original(described) else None


def config_without_files(original: Mapping[str, Any]) -> Any:
    """The native config of an original ``config.json`` alone.  The number of the image token, which only
    the tokenizer knows, is the vocabulary's last.  Raises ModelError (see ``native_config``)."""
    from transformers import InternVLConfig

    vocabulary = (original.get("llm_config") or {}).get("vocab_size", 1)
    return InternVLConfig(**native_config(original, vocabulary - 1))


def processor_with(source: BaseSource, config: Any, location: str | Path) -> Any:
    """The processor of a model, its tokenizer (of another layout than the original's: all of it) read from
    ``location``."""
    if original_config_of(source) is None:
        return _processor(location, config)
    folder = _folder(source, ORIGINAL_TEXT_FILES)
    return load_original_processor(folder, config, location if isinstance(location, Path) else None)


def load_image_text(source: BaseSource, config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model in ``dtype``, and its processor.  Raises ModelError."""
    with quiet_transformers():
        from transformers import AutoModelForImageTextToText

        try:
            if original_config_of(source) is not None:
                return load_original(_folder(source, ORIGINAL_FILES), config, dtype)
            model = AutoModelForImageTextToText.from_pretrained(
                source.location, dtype=dtype, use_safetensors=True
            )
            return model, _processor(source.location, config)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def load_held_image_text(
    source: BaseSource, config: Any, stored: Stored, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The same with the language model's weights held as ``stored``.  Raises ModelError."""
    with quiet_transformers():
        try:
            original = original_config_of(source)
            if original is None:
                return held_model(config, source, stored, dtype), _processor(source.location, config)
            folder = _folder(source, ORIGINAL_FILES)
            processor = load_original_processor(folder, config)
            layout = layout_of(config.to_dict(), is_internlm2(original))
            model = held_model(config, replace(source, location=folder), stored, dtype, layout)
            end_turns(model, processor)
            return model, processor
        except ModelError as error:
            raise ModelError(f"{source.name}: {error}") from error
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def load_processor_of(source: BaseSource, config: Any) -> Any:
    """The processor of a model that sees images, without its weights.  Raises ModelError."""
    with quiet_transformers():
        try:
            if original_config_of(source) is not None:
                return load_original_processor(_folder(source, ORIGINAL_TEXT_FILES), config)
            return _processor(source.location, config)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def image_cutter(source: BaseSource, config: Any, processor: Any = None) -> Any:
    """What cuts images into tiles for an InternVL: its processor's, or as its config says; None for a model
    of another kind."""
    if config.model_type != NATIVE_TYPE:
        return None
    if processor is not None:
        return processor.image_processor
    return image_processor_of(original_config_of(source) or NATIVE_TILES, config)


def has_system_prompt(source: BaseSource) -> bool:
    """Whether the template is known to begin with InternVL's system prompt: in its original layout."""
    return source.gguf_file is None and original_config_of(source) is not None


def is_internvl(model: Any) -> bool:
    return bool(model.config.model_type == NATIVE_TYPE)


def prompt_notes(config: Any, tokenizer: Any) -> list[str]:
    """What a user should know of the model's chat template."""
    template = str(tokenizer.chat_template)
    if config.model_type != NATIVE_TYPE or SYSTEM_PROMPT in template or NO_PROMPT in template:
        return []
    return [
        "the chat template of this InternVL has no system prompt of its own; versions 2.5 and 3 were trained "
        f"with one in their original layout: {SYSTEM_PROMPT}"
    ]


def _processor(location: str | Path, config: Any) -> Any:
    """The processor, whose tokenizer speaks in the template that knows of images."""
    processor = load_processor(location, config)
    if processor.chat_template:
        processor.tokenizer.chat_template = processor.chat_template
    return processor


def _folder(source: BaseSource, files: tuple[str, ...]) -> Path:
    """The folder of a model, fetched from the hub if it is not here: only ``files``."""
    if isinstance(source.location, Path):
        return source.location
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.location, allow_patterns=list(files)))
