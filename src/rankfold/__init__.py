"""LoRA fine-tuning you can trust, on the machine you have.

``from rankfold import LoraConfig, get_peft_model`` is all a library user needs; ``Recipe`` and
``fine_tune`` are the command line's ``rankfold train`` in Python, and ``check``, ``forecast``, ``resume``,
``evaluate``, ``load_tuned`` and ``reply`` its other verbs.  Every name is imported on first use."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_NAMES = {
    "data.check.doctor": "CheckRequest check",
    "errors": "RankfoldError RankfoldWarning",
    "export.request": "ExportRequest",
    "export.run": "export_adapter",
    "lora.config.data_starts": "CordaConfig EvaConfig LoftQConfig LoraGAConfig",
    "lora.config.variant_configs": "ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
    "lora.config.lora_config": "LoraConfig LoraRuntimeConfig PeftType TaskType",
    "lora.layers.registry": "register_layer",
    "lora.layers.factors": "LoraLayer",
    "lora.variants.monteclora": "MontecloraSampler",
    "models.base.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification"
    ),
    "models.base.kbit": "dequantise prepare_model_for_kbit_training",
    "models.base.load": "load_base load_tuned",
    "models.answering.answer": "Answer",
    "models.answering.answers": "answer_all answers replies reply",
    "models.answering.sampling": "Sampling",
    "peft_surface.arrow": "create_arrow_model",
    "peft_surface.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft_surface.gathering": "preprocess_corda preprocess_loraga",
    "models.adapters.combine": "CombineRequest combine_adapters",
    "models.adapters.loftq": "replace_lora_weights_loftq",
    "peft_surface.functional": (
        "get_base_model_state_dict get_peft_model_state_dict inject_adapter_in_model load_peft_weights "
        "set_base_model_state_dict set_peft_model_state_dict set_requires_grad"
    ),
    "peft_surface.helpers": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
        "cast_mixed_precision_params check_if_peft_model get_peft_config"
    ),
    "peft_surface.hotswap": (
        "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap"
    ),
    "peft_surface.model": "PeftModel get_peft_model",
    "peft_surface.optimizers": "LoraFAOptimizer create_loraplus_optimizer create_lorafa_optimizer",
    "peft_surface.scaling": "rescale_adapter_scale",
    "peft_surface.status": "get_layer_status get_model_status",
    "peft_surface.tasks": (
        "PeftMixedModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
    ),
    "peft_surface.tuner": "LoraModel",
    "judging.request": "EvalRequest",
    "train.asked.recipe": "Recipe",
    "train.judging.evaluate": "evaluate",
    "train.planning.forecast": "ForecastRequest forecast",
    "train.run": "fine_tune resume",
}
# PEFT's names for what has another one here.
_ALIASES = {
    "BaseTuner": ("peft_surface.tuner", "LoraModel"),
    "BaseTunerLayer": ("lora.layers.base", "AdapterLayer"),
    "ModulesToSaveWrapper": ("lora.layers.saved", "SavedModule"),
    "NoMatchingPeftModuleError": ("errors", "NoMatchError"),
    "PeftConfig": ("lora.config.lora_config", "LoraConfig"),
    "PeftError": ("errors", "RankfoldError"),
    "PeftWarning": ("errors", "RankfoldWarning"),
    "TrainableTokensWrapper": ("lora.layers.tokens", "TokenLayer"),
}
# PEFT's names below its top: what its users import from ``tuners`` and ``utils`` is found here as well.
_BELOW = {
    **{
        name: (f"tuners.{module}", name)
        for module, names in {
            "lora.layer": "Conv1d Conv2d Conv3d Embedding Linear MultiheadAttention ParamWrapper",
            "lora.arrow": "_resolve_adapter_source",
            "lora.variants": (
                "BlockDiagonalLinear calculate_alora_offsets get_alora_offsets_for_forward "
                "get_alora_offsets_for_generate is_alora_relevant_in_batch"
            ),
            "lora.model": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
            "tuners_utils": (
                "_find_minimal_target_modules _maybe_include_all_linear_layers check_target_module_exists "
                "inspect_matched_modules"
            ),
        }.items()
        for name in names.split()
    },
    **{
        name: ("utils", name)
        for name in [
            "AuxiliaryTrainingWrapper",
            "DUMMY_MODEL_CONFIG",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
            "_get_submodules",
            "infer_device",
        ]
    },
}
_HOME = {name: (module, name) for module, names in _NAMES.items() for name in names.split()} | _ALIASES
_MODULES = ("tuners", "utils")

__all__ = [*sorted(_HOME)]  # noqa: PLE0604 - it is a list of text


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"rankfold.{name}")
    if name not in _HOME and name not in _BELOW:
        raise AttributeError(f"module 'rankfold' has no attribute {name!r}")
    module, own = _HOME.get(name) or _BELOW[name]
    return getattr(importlib.import_module(f"rankfold.{module}"), own)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
