"""The core: what LoRA computes, where it is put, and its files.  torch and safetensors only."""

from rankfold.lora.config.lora_config import LoraConfig, TaskType
from rankfold.lora.layers.registry import register_layer

__all__ = ["LoraConfig", "TaskType", "register_layer"]
