"""``peft.tuners.lora.config``."""

from rankfold.lora.config.data_starts import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from rankfold.lora.config.lora_config import LoraConfig, LoraRuntimeConfig

__all__ = [
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
]
