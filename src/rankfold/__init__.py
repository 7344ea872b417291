"""LoRA fine-tuning you can trust, on the machine you have.

``from rankfold import LoraConfig, get_peft_model`` is all a library user needs; ``Recipe`` and
``fine_tune`` are the command line's ``rankfold train`` in Python.  Every name is imported on first use."""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from rankfold.errors import RankfoldError
    from rankfold.lora import LoraConfig, PeftModel, PeftModelForCausalLM, TaskType, get_peft_model
    from rankfold.models.load import load_base, load_tuned
    from rankfold.train.recipe import Recipe
    from rankfold.train.run import fine_tune

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "RankfoldError",
    "Recipe",
    "TaskType",
    "fine_tune",
    "get_peft_model",
    "load_base",
    "load_tuned",
]

_HOME = {
    **dict.fromkeys(
        ("LoraConfig", "PeftModel", "PeftModelForCausalLM", "TaskType", "get_peft_model"), "rankfold.lora"
    ),
    "RankfoldError": "rankfold.errors",
    "Recipe": "rankfold.train.recipe",
    "load_base": "rankfold.models.load",
    "load_tuned": "rankfold.models.load",
    "fine_tune": "rankfold.train.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rankfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
