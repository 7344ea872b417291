"""PEFT's import paths for what stands in ``rankfold.lora`` and ``rankfold.peft_surface``."""

from rankfold.lora.config.lora_config import LoraConfig
from rankfold.peft_surface.tuner import LoraModel
from rankfold.tuners import lora

__all__ = ["LoraConfig", "LoraModel", "lora"]
