"""Saving the adapters of a wrapped model: the counterpart of ``checkpoint.load_onto``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankfold.lora.brought import embedding_tensors, embeddings_in
from rankfold.lora.checkpoint import file_tensors, save_adapter
from rankfold.lora.config import LoraConfig
from rankfold.lora.conversion import as_plain_adapter
from rankfold.lora.facts import AdapterFacts
from rankfold.lora.fingerprint import BaseFingerprint, fingerprint

if TYPE_CHECKING:
    from rankfold.lora.model import PeftModel


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
        known = dataclasses.replace(wrapped.adapter_facts.get(name, AdapterFacts()), **facts)
        complete = tensors | embedding_tensors(model, name, config, save_embeddings)
        place = folder if name == "default" else folder / name
        save_adapter(
            complete, config, place, known, facts.get("base") or base_fingerprint(wrapped, name, complete)
        )
        wrapped.adapter_facts[name] = known


def base_fingerprint(wrapped: PeftModel, name: str, saved: Collection[str]) -> BaseFingerprint:
    """The fingerprint of the base as the adapter found it, whatever is merged or split now, without the
    embeddings among ``saved``, keys of the adapter's file."""
    left_out = wrapped.peft_config[name].modules_to_save or ()
    model = wrapped.get_base_model()
    return fingerprint(model, [*left_out, *embeddings_in(model, saved)])
