"""LoRA fine-tuning you can trust, on the machine you have.

``from rankfold import LoraConfig, get_peft_model`` is all a library user needs; ``Recipe`` and
``fine_tune`` are the command line's ``rankfold train`` in Python.  Every name is imported on first use."""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from rankfold.errors import RankfoldError
    from rankfold.lora import LoraConfig, TaskType
    from rankfold.lora.layers.quantised import requantising
    from rankfold.models.base.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from rankfold.models.base.kbit import dequantise, prepare_model_for_kbit_training
    from rankfold.models.base.load import load_base, load_tuned
    from rankfold.peft_surface import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_layer_status,
        get_model_status,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from rankfold.train.huggingface import AdapterTrainer
    from rankfold.train.recipe import Recipe
    from rankfold.train.run import fine_tune

__version__ = "0.1.0"
__all__ = [
    "AdapterTrainer",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "RankfoldError",
    "Recipe",
    "TaskType",
    "dequantise",
    "fine_tune",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_base",
    "load_tuned",
    "prepare_model_for_kbit_training",
    "requantising",
    "set_peft_model_state_dict",
]

_HOME = {
    **dict.fromkeys(
        (
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "get_layer_status",
            "get_model_status",
            "get_peft_model",
            "get_peft_model_state_dict",
            "inject_adapter_in_model",
            "set_peft_model_state_dict",
        ),
        "rankfold.peft_surface",
    ),
    **dict.fromkeys(
        (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ),
        "rankfold.models.base.auto",
    ),
    **dict.fromkeys(("dequantise", "prepare_model_for_kbit_training"), "rankfold.models.base.kbit"),
    **dict.fromkeys(("LoraConfig", "TaskType"), "rankfold.lora"),
    "AdapterTrainer": "rankfold.train.huggingface",
    "RankfoldError": "rankfold.errors",
    "Recipe": "rankfold.train.recipe",
    "load_base": "rankfold.models.base.load",
    "load_tuned": "rankfold.models.base.load",
    "requantising": "rankfold.lora.layers.quantised",
    "fine_tune": "rankfold.train.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rankfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
