"""Loading a base model and its tokenizer, and a base with an adapter on it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from rankfold.errors import ConfigError, ModelError
from rankfold.lora import LoraConfig
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, Fault
from rankfold.models.adapters.convert import natively_named
from rankfold.models.base.base import Base
from rankfold.models.base.find import DEFAULT_MODEL, BaseSource, cannot_load, find_base
from rankfold.models.base.fitting import fit_to_adapter
from rankfold.models.base.heap import large_blocks_apart
from rankfold.models.base.image_text import (
    image_text_config,
    is_internvl,
    load_held_image_text,
    load_image_text,
    prompt_notes,
)
from rankfold.models.base.packed import describe, held_model
from rankfold.models.base.precision import (
    Precision,
    choose_precision,
    default_device,
    held_notes,
    hold_in,
)
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.base.text_side import text_side
from rankfold.models.base.tokens import with_tokens
from rankfold.models.choices import ModelRequest, Stored
from rankfold.models.gguf.architectures import ARCHITECTURES
from rankfold.models.gguf.file import GgufFile, read_gguf
from rankfold.models.gguf.others import other_model
from rankfold.peft_surface import PeftModel


@large_blocks_apart()
def load_base(name: str, precision: Precision | None = None, stored: Stored | None = None) -> Base:
    """Load ``name`` (see ``find_base``) as ``precision`` says, by default in float32 on a CPU, in bfloat16
    on a GPU that computes in it.

    With ``stored`` the weights of linear layers and embeddings are held in fewer bytes and expanded when they
    are used: "gguf" (the blocks of a GGUF file as they are), "bfloat16", "int8" (a scale for each output),
    "q4_0" (GGUF's blocks) or "nf4" (bitsandbytes); of a model that sees images the language model's only.

    A GGUF file is read as llama.cpp reads it: its keys, its tensors, how its tokenizer splits text.
    Only safetensors and GGUF weights are read, and no code from a model folder is run.

    Raises ModelError, also if a weight is too large for float16."""
    source = find_base(name)
    notes: list[str] = []
    processor = None
    config = None if source.gguf_file is not None else image_text_config(source)
    dtype = precision.storage if precision else _usual_storage()
    if stored is not None and config is not None:
        model, processor = load_held_image_text(source, config, stored, dtype)
        tokenizer = processor.tokenizer
        notes += [describe(model), *prompt_notes(config, tokenizer)]
    elif stored is not None or source.gguf_file is not None:
        model, tokenizer = _load_held(source, stored, dtype, notes)
    elif config is not None:
        model, processor = load_image_text(source, config, dtype)
        tokenizer = processor.tokenizer
        notes += prompt_notes(config, tokenizer)
    else:
        model, tokenizer = _load_transformers(source, dtype)
    _check_vocabulary(model, tokenizer, name)
    if precision and stored is None:
        notes += held_notes(model, _comes_as(source, config), dtype)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = name
    return Base(model.to(default_device()).eval(), tokenizer, source, notes, processor=processor)


def load_tuned(
    adapter: str | Path,
    model_name: str | None = None,
    allow: Collection[Fault] = (),
    merged: bool = True,
    precision: Precision | None = None,
    stored: Stored | None = None,
) -> Base:
    """Load the base that ``adapter`` names (or ``model_name``) and merge the adapter into it; if not
    ``merged``, put it beside the weights.

    ``allow``: faults to let through (see LoadOptions); "base" stands for another tokenizer too.
    ``precision`` and ``stored``: see ``load_base``.
    Raises AdapterError or ModelError."""
    AdapterSource.of(adapter, {"allow": allow})  # a misspelt fault is told before the base is loaded
    config = LoraConfig.from_pretrained(adapter)
    name = model_name or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to; name it with --model")
    base = load_base(name, precision, stored)
    base = fit_to_adapter(base, Path(adapter), AdapterMetadata.read(Path(adapter)), allow)
    with natively_named(Path(adapter), name) if is_internvl(base.model) else nullcontext(adapter) as folder:
        model = PeftModel.from_pretrained(base.model, folder, allow=allow)
    return replace(base, model=model.merge_and_unload() if merged else model.eval())


def load_weights(source: BaseSource, kind: Any, dtype: Any = None, revision: str | None = None) -> Any:
    """A model of the transformers class ``kind`` from ``source``, in ``dtype`` or, by default, its own.

    Only safetensors weights are read, a GGUF file's for a causal language model; no code from a model
    folder is run.  Raises ModelError."""
    if source.gguf_file is not None:
        if kind.__name__ != "AutoModelForCausalLM":
            raise ModelError(f"{source.name}: a GGUF file can be loaded as a causal language model only")
        model = load_base(source.name).model
        return model if dtype is None else model.to(dtype)
    with quiet_transformers():
        try:
            model = kind.from_pretrained(
                source.location, dtype=dtype or "auto", use_safetensors=True, revision=revision or "main"
            )
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error
    model.name_or_path = model.config.name_or_path = source.name
    return model.eval()


def load(asked: ModelRequest, merged: bool = True) -> Base:
    """What is ``asked`` for: ``load_tuned`` if there is an adapter, else ``load_base`` of the named or the
    default model.  An adapter is not merged into weights in fewer bytes, which would round it.

    Raises ConfigError too."""
    if asked.allow and not asked.adapter:
        raise ConfigError("--allow says what an adapter may lack, and there is no --adapter")
    precision = choose_precision(asked.precision, default_device()) if asked.precision else None
    if asked.adapter:
        whole, allow = merged and not asked.is_rounded, cast(list[Fault], asked.allow)
        base = load_tuned(asked.adapter, asked.model, allow, whole, precision, asked.stored)
    else:
        base = load_base(asked.model or DEFAULT_MODEL, precision, asked.stored)
    if precision and precision.cost:
        base = base.noting([precision.cost])
    return base.reading_by(with_tokens(base.tokenizer, asked.eos_token, ())) if asked.eos_token else base


def _comes_as(source: BaseSource, config: Any) -> torch.dtype:
    """What the weights are written in, as their config says (``config`` for a model that sees images); a
    GGUF file's are expanded to float32."""
    if source.gguf_file is not None:
        return torch.float32
    if config is None:
        with quiet_transformers():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(source.location)
    dtype: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return dtype


def _usual_storage() -> torch.dtype:
    narrow = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if narrow else torch.float32


def _load_transformers(source: BaseSource, dtype: torch.dtype) -> tuple[Any, Any]:
    """Weights are read in ``dtype``: casting the model afterwards would round the positions' angles too."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source.location)
            model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, use_safetensors=True)
        except Exception as error:  # a damaged file raises whatever its reader happens to raise
            raise cannot_load(source.location, source.name, error) from error
    return model, tokenizer


def _load_held(
    source: BaseSource, stored: Stored | None, dtype: torch.dtype, notes: list[str]
) -> tuple[Any, Any]:
    side = text_side(source)
    notes += side.notes
    try:
        other = None if stored is not None else _other(source)
        with quiet_transformers():
            model: Any = (
                held_model(side.config, source, stored, dtype) if other is None else other_model(other)
            )
        if other is not None:
            model = hold_in(model, dtype)
            model.generation_config.eos_token_id = side.config.eos_token_id
    except ModelError as error:
        raise ModelError(f"{source.name}: {error}") from error
    except Exception as error:  # a damaged file raises whatever its reader happens to raise
        raise cannot_load(source.location, source.name, error) from error
    if stored is not None:
        notes.append(describe(model))
    return model, side.tokenizer


def _other(source: BaseSource) -> GgufFile | None:
    """The GGUF file if transformers has to read it."""
    file = None if source.gguf_file is None else read_gguf(source.gguf_file, words=False)
    return None if file is None or file.architecture in ARCHITECTURES else file


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer):,} entries but the model embeds {rows:,}; "
            "they do not belong together"
        )
