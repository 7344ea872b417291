"""``peft.tuners.lora.loraga``."""

from rankfold.peft_surface.gathering import preprocess_loraga

__all__ = ["preprocess_loraga"]
