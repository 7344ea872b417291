"""``peft.utils``: PEFT's import path for small things; nothing is defined here."""

from rankfold.lora.config.lora_config import CONFIG_NAME, PeftType, TaskType
from rankfold.lora.files.adapter_reader import PICKLED_NAME as WEIGHTS_NAME
from rankfold.lora.files.adapter_reader import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from rankfold.lora.layers.base import AuxiliaryLayer as AuxiliaryTrainingWrapper
from rankfold.lora.layers.saved import SavedModule as ModulesToSaveWrapper
from rankfold.lora.layers.tokens import TokenLayer as TrainableTokensWrapper
from rankfold.lora.placing.targets import USUAL_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from rankfold.peft_surface.functional import (
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from rankfold.peft_surface.helpers import (
    DUMMY_MODEL_CONFIG,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    cast_mixed_precision_params,
    infer_device,
)
from rankfold.peft_surface.helpers import (
    get_submodules as _get_submodules,
)

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "set_peft_model_state_dict",
]
