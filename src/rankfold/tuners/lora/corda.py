"""``peft.tuners.lora.corda``."""

from rankfold.lora.starts.corda import CordaEigens
from rankfold.peft_surface.gathering import preprocess_corda

__all__ = ["CordaEigens", "preprocess_corda"]
