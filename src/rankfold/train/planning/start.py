"""Where a run starts: with a fresh adapter, or with one that was trained before."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rankfold.errors import AdapterError, ConfigError, bullet_list
from rankfold.lora import LoraConfig, TaskType
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import PICKLED_NAME, WEIGHTS_NAME
from rankfold.models.adapters.modalities import Scope
from rankfold.models.base.base import Base
from rankfold.models.base.find import find_base
from rankfold.models.base.fitting import fit_to_adapter
from rankfold.models.base.tokens import with_tokens
from rankfold.peft_surface import PeftModel, get_peft_model
from rankfold.train.asked.advise import Settings
from rankfold.train.asked.recipe import Recipe
from rankfold.train.planning.rows import Text
from rankfold.train.planning.starting import Seen, started

R = TypeVar("R", bound=Recipe)


def as_its_adapter(recipe: R) -> R:
    """``recipe`` with the base, rank, alpha and targets of the adapter that it starts from, if it names one.

    Raises AdapterError if there is none, ConfigError listing every setting that says otherwise."""
    if recipe.adapter is None:
        return recipe
    config = LoraConfig.from_pretrained(recipe.adapter)
    _weights_of(recipe.adapter)
    own: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    if config.target_modules is not None:
        targets = config.target_modules
        own["targets"] = targets if isinstance(targets, str) else sorted(targets)
    if recipe.model_fields_set.isdisjoint({"model"}) and config.base_model_name_or_path:
        own["model"] = config.base_model_name_or_path
    problems = [
        f"{name}: {getattr(recipe, name)!r}, and the adapter has {value!r}"
        for name, value in own.items()
        if name in recipe.model_fields_set and _in_order(getattr(recipe, name)) not in (None, value)
    ]
    problems += [
        f"{name}: the adapter says what is adapted; leave it out"
        for name in ("parts", "whole", "use_dora", "use_rslora")
        if getattr(recipe, name) != Recipe.model_fields[name].default
    ]
    if problems:
        raise ConfigError(
            bullet_list(f"the adapter in {recipe.adapter} cannot be started from so:", problems)
        )
    return recipe.model_copy(update=own)


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def text_of_start(recipe: Recipe, text: Text) -> Text:
    """``text`` as the adapter that ``recipe`` starts from was trained with, and as ``recipe`` says.

    Raises ModelError, AdapterError or ConfigError."""
    assert recipe.adapter is not None
    facts = AdapterMetadata.read(recipe.adapter)
    base = Base(None, text.tokenizer, find_base(recipe.model), processor=text.processor)
    base = fit_to_adapter(base, recipe.adapter, facts, allow=())
    new = [word for word in recipe.as_tokens if word not in facts.as_tokens]
    base = base.reading_by(with_tokens(base.tokenizer, recipe.eos_token, new))
    return replace(text, tokenizer=base.tokenizer, processor=base.processor, started=facts, notes=base.notes)


def adapted(base: Base, recipe: Recipe, settings: Settings, scope: Scope, seen: Seen) -> PeftModel:
    """The model to train: ``base`` with a fresh adapter, which may begin by what is ``seen``, or with the one
    that ``recipe`` names.

    Raises AdapterError, TargetError or ConfigError."""
    if recipe.adapter is not None:
        return PeftModel.from_pretrained(base.model, recipe.adapter, is_trainable=True, allow=())
    config = adapter_config(recipe, settings, scope)
    if recipe.start != "plain":
        return started(base.model, config, recipe, seen)
    return get_peft_model(base.model, config)


def adapter_config(recipe: Recipe, settings: Settings, scope: Scope) -> LoraConfig:
    """What ``recipe`` asks of a fresh adapter."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=recipe.dropout,
        use_dora=recipe.use_dora,
        use_rslora=recipe.use_rslora,
        **scope.options(),
    )


def adapter_hash(folder: Path | None) -> str:
    """sha256 of the weights of the adapter that a run starts from; empty if it starts afresh."""
    return "" if folder is None else hashlib.sha256(_weights_of(folder).read_bytes()).hexdigest()


def _weights_of(folder: Path) -> Path:
    found = next((folder / name for name in (WEIGHTS_NAME, PICKLED_NAME) if (folder / name).is_file()), None)
    if found is None:
        raise AdapterError(f"{folder} holds no {WEIGHTS_NAME}: a run starts from an adapter's folder here")
    return found
