"""The LoRA core: configuration, layers, targets, the wrapped model and its files.  torch only."""

from rankfold.lora import attention, conv, embedding, linear, quantised, storage  # noqa: F401 - layers register themselves
from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.functional import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from rankfold.lora.layers import register_layer
from rankfold.lora.model import PeftModel, get_peft_model
from rankfold.lora.status import get_layer_status, get_model_status
from rankfold.lora.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TaskType",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "register_layer",
    "set_peft_model_state_dict",
]
