"""Making a base what an adapter was trained on: its tokens, its template, its vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rankfold.errors import AdapterError, ModelError
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import WEIGHTS_NAME, Fault
from rankfold.models.base.base import Base
from rankfold.models.base.processors import set_most_tiles
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.base.tokenizer_marks import tokenizer_changes
from rankfold.models.base.tokens import with_tokens
from rankfold.models.messages.plain_template import plain_template

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def fit_to_adapter(base: Base, folder: Path, facts: AdapterMetadata, allow: Collection[Fault]) -> Base:
    """``base`` as it read text when the adapter in ``folder`` was trained.  Its model may be None, if it is
    not loaded yet; its vocabulary may have to grow then (see ``grow_vocabulary``), which is done in place.

    Raises ModelError if its tokenizer is another one, AdapterError for a damaged one in the folder."""
    if base.model is not None:
        base = base.noting(grow_vocabulary(base.model, folder))
    if (own := own_tokenizer(folder)) is not None and len(own) > len(base.tokenizer):
        own.name_or_path = base.tokenizer.name_or_path
        told = f"the tokenizer is the one in {folder}, which has more words than the base's"
        base = base.reading_by(own).noting([told])
    base = base.reading_by(with_tokens(base.tokenizer, facts.eos_token, facts.as_tokens))
    if facts.image_tiles is not None and base.processor is not None:
        set_most_tiles(base.processor, facts.image_tiles)
    changed = tokenizer_changes(facts.tokenizer, base.tokenizer)
    if facts.chat_template:  # the adapter's counts, whatever template the base has by now
        base.tokenizer.chat_template = plain_template(facts.chat_template)
        changed = [part for part in changed if part != "chat_template"]
    if changed and "base" not in allow:
        raise ModelError(
            f"the tokenizer of {base.source.name} is not the one that {folder} was trained with: another "
            f"{' and another '.join(changed)}; name the right base with --model, or allow 'base' "
            "(--allow base) to use it all the same"
        )
    notes = [f"the tokenizer has another {part} than in training" for part in changed]
    return replace(base, prompt_style=facts.prompt_style).noting(notes)


def own_tokenizer(folder: Path) -> Any:
    """The tokenizer that an adapter brings in its folder, if it does.  Raises AdapterError."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise AdapterError(f"cannot read the tokenizer in {folder}: {str(error)[:200]}") from error


def grow_vocabulary(model: Any, folder: Path) -> list[str]:
    """Make the embeddings of ``model`` as long as an adapter's own tokenizer and tensors need, as PEFT does,
    with new rows that are the same each time; says so.  Raises AdapterError for a damaged tokenizer."""
    own, embedding = own_tokenizer(folder), model.get_input_embeddings()
    if embedding is None:
        return []
    rows = embedding.weight.shape[0]
    wanted = max(0 if own is None else len(own), _rows_in_file(model, embedding, folder))
    if wanted <= rows:
        return []
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model.resize_token_embeddings(wanted)
    return [f"the base's vocabulary grew from {rows:,} to {wanted:,} rows, as the adapter has it"]


def _rows_in_file(model: Any, embedding: Any, folder: Path) -> int:
    """How many rows of the input embedding an adapter's file has; 0 if it brings none."""
    path = next(name for name, module in model.named_modules() if module is embedding)
    endings = (f"{path}.weight", f"{path}.base_layer.weight", f"{path}.lora_embedding_A")
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # told when the adapter is read
        return 0
    found = [shape[key.endswith("A")] for key, shape in shapes.items() if key.endswith(endings)]
    return max(found, default=0)
