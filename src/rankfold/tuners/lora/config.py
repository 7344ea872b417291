"""``peft.tuners.lora.config``."""

from rankfold.lora.config.data_starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from rankfold.lora.config.lora_config import LoraConfig, LoraRuntimeConfig
from rankfold.lora.config.variant_configs import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "VeloraConfig",
]
