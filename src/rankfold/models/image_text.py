"""Base models that see images: transformers' own, and InternVL's original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rankfold.models.find import BaseSource, cannot_load
from rankfold.models.internvl.chat import NO_PROMPT, SYSTEM_PROMPT
from rankfold.models.internvl.config import NATIVE_TYPE, is_original
from rankfold.models.internvl.loading import load_original, load_original_processor, native_config_of
from rankfold.models.processors import load_processor, sees_images
from rankfold.models.quiet import quiet_transformers

# What a model of the original layout needs of a hub repository: none of its Python files.
ORIGINAL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
ORIGINAL_TEXT_FILES = ("*.json", "*.model", "*.txt")


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
            return model, _processor(source, config)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def load_processor_of(source: BaseSource, config: Any) -> Any:
    """The processor of a model that sees images, without its weights.  Raises ModelError."""
    with quiet_transformers():
        try:
            if original_config_of(source) is not None:
                return load_original_processor(_folder(source, ORIGINAL_TEXT_FILES), config)
            return _processor(source, config)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


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


def _processor(source: BaseSource, config: Any) -> Any:
    """The processor, whose tokenizer speaks in the template that knows of images."""
    processor = load_processor(source.location, config)
    if processor.chat_template:
        processor.tokenizer.chat_template = processor.chat_template
    return processor


def _folder(source: BaseSource, files: tuple[str, ...]) -> Path:
    """The folder of a model, fetched from the hub if it is not here: only ``files``."""
    if isinstance(source.location, Path):
        return source.location
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source.location, allow_patterns=list(files)))
