"""The models that are judged: as in training in the number format that is fast here, unless one is given."""

from __future__ import annotations

from dataclasses import replace

from rankfold.models.base.base import Base
from rankfold.models.base.load import load
from rankfold.models.base.precision import choose_precision, default_device
from rankfold.models.choices import ModelRequest
from rankfold.peft_surface import PeftModel


def tuned_of(asked: ModelRequest) -> Base:
    """The model that is asked for, with its adapter if it has one."""
    return load(_settled(asked))


def base_of(asked: ModelRequest) -> Base:
    """The base of an adapter, which reads and writes as the tuned model does."""
    base = load(_settled(asked), merged=False)
    return replace(base, model=base.model.unload()) if isinstance(base.model, PeftModel) else base


def _settled(asked: ModelRequest) -> ModelRequest:
    if asked.precision is not None or asked.stored is not None:
        return asked
    return asked.model_copy(update={"precision": choose_precision(None, default_device()).name})
