"""The LoRA core: configuration, layers, targets, the wrapped model and its files.  torch only."""

from rankfold.lora import linear  # noqa: F401 - a layer registers itself when it is imported
from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.layers import register_layer
from rankfold.lora.model import PeftModel, get_peft_model
from rankfold.lora.tasks import PeftModelForCausalLM

__all__ = [
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "TaskType",
    "get_peft_model",
    "register_layer",
]
