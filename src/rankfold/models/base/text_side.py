"""What a base says of itself without its weights: its config and its tokenizer.

Of a GGUF file that was read before, the tokenizer alone is there without torch, whose import takes longer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.models.base.find import BaseSource, cannot_load, find_base
from rankfold.models.base.quiet import quiet_transformers

READING = 1  # counted up when what is read of a GGUF file changes, so that what was kept is not used
NOTES_NAME, CONFIG_NAME = "notes.json", "config.json"


@dataclass
class TextSide:
    """transformers' config and tokenizer; ``notes`` are facts a user should be told."""

    config: Any
    tokenizer: Any
    notes: list[str] = field(default_factory=list)


def text_side(source: BaseSource) -> TextSide:
    """Of a base that reads text; a GGUF file's is kept in the cache folder, where it is read in less time.

    Raises ModelError."""
    try:
        return _of_model(source.location) if source.gguf_file is None else _of_gguf(source.gguf_file)
    except Exception as error:  # a damaged file raises whatever its reader happens to raise
        raise cannot_load(source.location, source.name, error) from error


def load_text(name: str) -> tuple[Any, Any, int | None]:
    """The tokenizer of ``name`` (see ``find_base``) without its weights, its processor if it sees images,
    else None, and the longest input in tokens that the model was made for, if its config says so.

    Raises ModelError."""
    source = find_base(name)
    if source.gguf_file is not None:
        kept = _place_of(source.gguf_file)
        if (kept / CONFIG_NAME).is_file():
            told = json.loads((kept / CONFIG_NAME).read_text(encoding="utf-8"))
            return _kept_tokenizer(kept), None, told.get("max_position_embeddings")
    elif (seeing := _image_text_config(source)) is not None:
        from rankfold.models.base.image_text import load_processor_of

        processor = load_processor_of(source, seeing)
        return processor.tokenizer, processor, longest_input(seeing)
    side = text_side(source)
    return side.tokenizer, None, longest_input(side.config)


def _image_text_config(source: BaseSource) -> Any:
    from rankfold.models.base.image_text import image_text_config

    return image_text_config(source)


def longest_input(config: Any) -> int | None:
    """The longest input in tokens that a model with this config was made for, if the config says so."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def text_config(source: BaseSource) -> Any:
    """The config alone, which a folder may have without a tokenizer.  Raises ModelError."""
    if source.gguf_file is not None:
        return text_side(source).config
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(source.location)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error


def _of_model(location: str | Path) -> TextSide:
    with quiet_transformers():
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(location)
        return TextSide(config, AutoTokenizer.from_pretrained(location))


def _of_gguf(path: Path) -> TextSide:
    kept = _place_of(path)
    if not kept.is_dir():
        return _read_gguf_side(path, kept)
    with quiet_transformers():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(kept)
    return TextSide(
        config, _kept_tokenizer(kept), json.loads((kept / NOTES_NAME).read_text(encoding="utf-8"))
    )


def _place_of(path: Path) -> Path:
    """Where the text side of a GGUF file is kept."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return cache_folder() / "gguf" / f"{READING}-{digest}"


def _kept_tokenizer(kept: Path) -> Any:
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(kept)


def _read_gguf_side(path: Path, kept: Path) -> TextSide:
    from rankfold.models.gguf.architectures import ARCHITECTURES
    from rankfold.models.gguf.config import gguf_config
    from rankfold.models.gguf.file import read_gguf
    from rankfold.models.gguf.others import other_text_side
    from rankfold.models.gguf.tokenizer import gguf_tokenizer, special_ids

    file = read_gguf(path)
    if file.architecture in ARCHITECTURES:
        tokenizer = gguf_tokenizer(file)
        with quiet_transformers():
            config, notes = gguf_config(file, special_ids(tokenizer, file))
        side = TextSide(config, tokenizer, notes)
    else:
        side = TextSide(*other_text_side(file))
    try:
        with quiet_transformers(), staged_folder(kept) as folder:
            side.config.save_pretrained(folder)
            side.tokenizer.save_pretrained(folder)
            (folder / NOTES_NAME).write_text(json.dumps(side.notes), encoding="utf-8")
    except OutputError as error:
        if not kept.is_dir():  # else another process was faster
            side.notes.append(f"the tokenizer was not kept for next time: {error}")
    return side
