"""``peft.tuners.lora``."""

from rankfold.lora.config.data_starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from rankfold.lora.config.lora_config import LoraConfig, LoraRuntimeConfig
from rankfold.lora.config.variant_configs import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from rankfold.peft_surface.arrow import create_arrow_model
from rankfold.peft_surface.tuner import LoraModel
from rankfold.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "VeloraConfig",
    "create_arrow_model",
]
