"""The LoRA core: configuration, layers, targets, the wrapped model and its files.  torch only."""

from rankfold.lora.config import LoraConfig, TaskType
from rankfold.lora.model import PeftModel, PeftModelForCausalLM, get_peft_model

__all__ = ["LoraConfig", "PeftModel", "PeftModelForCausalLM", "TaskType", "get_peft_model"]
