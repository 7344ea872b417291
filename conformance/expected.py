"""Which of PEFT's tests do not count, and why the others that fail do so."""

from __future__ import annotations

import re

# Tests that do not count, by a pattern of their ids, each with the reason.
APART = {
    r"_pickle\b": "want `adapter_model.bin` written: no pickle is, the file is safetensors",
    r"test_(filter_state_dict_by|prefixes_)|test_lora_embed_scale_is_applied_mixed_batch|"
    r"result_caching_works|forward_under_autocast|target_multiple_parameters_on_same_module$|"
    r"quantization_backend_(bnb|irregular)": (
        "call private helpers of PEFT's (`_get_tuner_state_dict_key_prefixes`, `_LoraFactorsProxy`, "
        "`Bnb8bitBackend` ...)"
    ),
    r"peft_version_(is_(stored|dev)|warn)": "exchange the version in PEFT's own module",
    r"TestLoraVariants::test_(invalid_variant|unregistered|unsorted|multiple_string)": (
        "build PEFT's wrapper around a layer by hand: a layer here becomes its own subclass"
    ),
    r"prototypes_not_recomputed|test_variant_is_applied_to_layers\[dora": (
        "look into how PEFT's variants are made"
    ),
    r"test_mha_gradients_set_correctly|without_in_features_out_features|targets_lora_layer_raises|"
    r"config_tie_false\[|_with_modules_to_save$.*(?<=test_delete_adapter_multiple_adapters)|"
    r"mica_freezes_B_when_switching|requires_grad_(model_)?irregular$": (
        "look into PEFT's wrappers (`base_layer`, a wrapped `weight`, containers that stay empty or stay "
        "behind): a layer here is its own base layer, and is plain again without an adapter"
    ),
}
# Tests that count and fail, by a pattern of their ids: what is done here instead, and why.
DIFFERENCES = {
    r"exiting_context_irregular_state.*MlpUsingParameters": (
        "adapters on two parameters of one module are one layer here, switched on and off together"
    ),
    r"exiting_context_irregular_state": (
        "`disable_adapter()` leaves every layer in the state in which it found it, so there is no mixed "
        "state to warn of; PEFT switches all of them on"
    ),
    r"delete_adapter_properly_cleans_up": (
        "`frozen_peft_weight_names` is worked out when it is asked for; the test looks into an old answer"
    ),
    r"multiple_adapters_with_modules_to_save": (
        "a module without any copy is the plain module again and has no `modules_to_save`"
    ),
    r"multiple_adapters_with_trainable_token_indices": (
        "a tied head has no tokens of its own: it reads those of the embedding, also in what is saved"
    ),
    r"mixed_adapter_batches_partly_overlapping": (
        "the rows of an adapter are computed by themselves, which rounds otherwise than the whole batch; "
        "without a seed the test's margin of 1e-5 is not always enough"
    ),
    r"mixed_adapter_batches_lora_with_dora_raises": "DoRA adapters work in a mixed batch",
    r"with_different_scaling\[dare_": (
        "DARE leaves out values of the small cores of two updates, not of the updates themselves; the test's "
        "bounds are what PEFT's draws gave"
    ),
    r"test_weighted_combination_of_adapters": (
        "`linear` is the weighted sum, which of two adapters of rank 8 has rank 16"
    ),
    r"mha_with_dora_raises": "DoRA works on an attention layer",
    r"mixed_adapter_batches_training_mode_raises": "a batch of several adapters can be trained",
    r"TestLoraGAIntegration::test_save_load_inference|kasa_truncation_changes_base_forward|"
    r"disable_adapters_with_merging.*KaSA": (
        "what a start or a variant took of a weight is given back with the adapter; in PEFT the base stays "
        "changed, and the test loads onto that"
    ),
    r"kasa_mixing_with_non_kasa_adapter_raises": (
        "each adapter has the base that it was made for, so KaSA and other adapters can be on one model"
    ),
    r"init_without_lora_ga_config_raises": "LoRA-GA without a config takes its defaults",
    r"arrow_forward_float16": (
        "`dtype` is no word of loading an adapter; PEFT takes it and does nothing with it"
    ),
    r"(pissa|olora|corda)_(rank|alpha)_pattern_and_rslora_raises": (
        "that conversion works: the scale of each layer is known here; the file means the same, which is "
        "tested"
    ),
    r"different_target_parameters_raises|works_with_existing_parametrization": (
        "adapters may name different parameters; each keeps its own"
    ),
    r"bias_argument\[invalid\]": (
        "`bias='invalid'` is refused when the config is made, not when a model is: a ConfigError"
    ),
    r"warning_name_custom_model": (
        "a base without a name leaves `base_model_name_or_path` as the user wrote it; PEFT sets it to None"
    ),
    r"warn_for_tied_embeddings_merge": (
        "merging into a tied head unties it, and the model that comes out is right; PEFT changes the "
        "embedding too and tells how to repair that"
    ),
    r"target_modules_not_disjoint_raises": (
        "the same error without the address where PEFT's bugs are reported"
    ),
}


def reason(test: str, reasons: dict[str, str]) -> str | None:
    """What the first pattern that fits ``test`` says."""
    return next((text for pattern, text in reasons.items() if re.search(pattern, test)), None)
