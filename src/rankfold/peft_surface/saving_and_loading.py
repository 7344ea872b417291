"""Saving the adapters of a wrapped model, and loading one onto it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankfold.errors import AdapterError, ConfigError, TargetError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.config.names import check_adapter_name
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import AdapterSource, LoadResult, read_adapter
from rankfold.lora.files.checkpoint import file_tensors, fill_adapter, save_adapter
from rankfold.lora.files.fingerprint import BaseFingerprint, fingerprint
from rankfold.lora.files.saved_embeddings import bring, embedding_tensors, embeddings_in, find_brought
from rankfold.lora.layers.init import warn_if_random
from rankfold.lora.layers.saved import with_task_modules
from rankfold.lora.placing.inject import remove_adapter
from rankfold.lora.placing.ties import check_agreement
from rankfold.peft_surface.conversion import as_plain_adapter

if TYPE_CHECKING:
    from rankfold.peft_surface.model import PeftModel


def save_from(
    wrapped: PeftModel,
    names: Collection[str],
    folder: Path,
    *,
    save_embeddings: bool | str,
    initial: Path | None,
    facts: Mapping[str, Any],
) -> None:
    """Write the adapters ``names`` below ``folder``; the words are those of ``PeftModel.save_pretrained``."""
    model = wrapped.get_base_model()
    forms: dict[str, tuple[LoraConfig, dict[str, Tensor]]] = {}
    for name in names:
        config = wrapped.peft_config[name]
        if initial is None:
            forms[name] = config, {**file_tensors(model, name, config)}
        else:
            forms[name] = as_plain_adapter(model, name, config, initial)
    for name, (config, tensors) in forms.items():
        known = dataclasses.replace(wrapped.adapter_metadata.get(name, AdapterMetadata()), **facts)
        complete = tensors | embedding_tensors(model, name, config, save_embeddings)
        place = folder if name == "default" else folder / name
        save_adapter(
            complete, config, place, known, facts.get("base") or base_fingerprint(wrapped, name, complete)
        )
        wrapped.adapter_metadata[name] = known


def base_fingerprint(wrapped: PeftModel, name: str, saved: Collection[str]) -> BaseFingerprint:
    """The fingerprint of the base as the adapter found it, whatever is merged or split now, without the
    embeddings among ``saved``, keys of the adapter's file."""
    left_out = wrapped.peft_config[name].modules_to_save or ()
    model = wrapped.get_base_model()
    return fingerprint(model, [*left_out, *embeddings_in(model, saved)])


def load_onto(wrapped: PeftModel, name: str, config: LoraConfig, source: AdapterSource) -> LoadResult:
    """Place an adapter with ``config`` on the model in ``wrapped`` and fill it from ``source``.

    Raises AdapterError listing all that does not fit, ConfigError for the name; nothing is changed then."""
    model, before = wrapped.get_base_model(), wrapped.targeted_module_names
    config = with_task_modules(config)
    check_adapter_name(name, wrapped.peft_config)
    stored = read_adapter(source, config, model)
    config = stored.config
    warn_if_random(config)
    try:
        wrapped._place(name, stored.targets, config)
    except (ConfigError, TargetError) as error:
        raise AdapterError(f"{source.folder}: {error}") from error
    try:
        wanted = file_tensors(model, name, config)
        brought = find_brought(model, stored.tensors, wanted, config)
        result = fill_adapter(stored, wanted | {key: place for key, (_, place) in brought.items()})
        check_agreement(model, name, stored.tensors)
        bring(model, name, dict(brought.values()))
    except BaseException:
        remove_adapter(model, name)
        del wrapped.peft_config[name]
        wrapped.targeted_module_names = before
        raise
    wrapped.adapter_metadata[name] = stored.facts
    return result
