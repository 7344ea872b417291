"""``peft.tuners.lora.model``."""

from rankfold.lora.placing.targets import USUAL_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from rankfold.peft_surface.tuner import LoraModel

__all__ = ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "LoraModel"]
