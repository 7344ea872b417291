"""What a base says of itself without its weights: its config and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankfold.errors import OutputError
from rankfold.files import cache_folder, staged_folder
from rankfold.models.base.find import BaseSource, cannot_load
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.gguf.architectures import ARCHITECTURES
from rankfold.models.gguf.config import gguf_config
from rankfold.models.gguf.file import read_gguf
from rankfold.models.gguf.others import other_text_side
from rankfold.models.gguf.tokenizer import gguf_tokenizer, special_ids

READING = 1  # counted up when what is read of a GGUF file changes, so that what was kept is not used
NOTES_NAME = "notes.json"


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
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kept = cache_folder() / "gguf" / f"{READING}-{digest}"
    if kept.is_dir():
        with quiet_transformers():
            from transformers import AutoConfig, PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(kept)
            config = AutoConfig.from_pretrained(kept)
        return TextSide(config, tokenizer, json.loads((kept / NOTES_NAME).read_text(encoding="utf-8")))
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
