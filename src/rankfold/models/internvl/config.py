"""The config of an InternVL from the original layout to the native one and back, as JSON objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankfold.errors import ModelError, bullet_list
from rankfold.models.internvl.groups import Groups
from rankfold.models.internvl.names import Layout

ORIGINAL_TYPE, NATIVE_TYPE = "internvl_chat", "internvl"
Json = dict[str, Any]

INTERNLM2 = "InternLM2ForCausalLM"
# Language models by architecture, with transformers' model type.
LANGUAGE_TYPES = {
    INTERNLM2: "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# The original classes' own defaults, which a config.json may leave out (configuration_*.py at 2410d1d).
CHAT_DEFAULTS: Json = {
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
VISION_DEFAULTS: Json = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
INTERNLM2_DEFAULTS: Json = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000,
    "rope_scaling": None,
    "rope_pos_id_version": "default",
}
# Vision fields whose names differ.
VISION_NAMES = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "projection_dropout",
    "initializer_factor": "layer_scale_init_value",
}
KEPT_AS_THEY_ARE = ("num_key_value_heads", "bias", "rope_theta", "rope_scaling", "rope_pos_id_version")
NORM_EPS = 1e-6  # of the native tower's qk norms, whatever the config says


def is_original(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == ORIGINAL_TYPE


def native_config(original: Mapping[str, Any], image_token_id: int) -> Json:
    """The ``InternVLConfig`` of an original ``config.json``.

    Raises ModelError listing everything that the native classes would compute otherwise."""
    chat = {**CHAT_DEFAULTS, **original}
    vision = {**VISION_DEFAULTS, **(original.get("vision_config") or {})}
    language = original.get("llm_config") or {}
    problems = [*_chat_problems(chat, vision), *_language_problems(language)]
    if problems:
        raise ModelError(bullet_list("this InternVL cannot be loaded natively:", problems))
    size = chat["force_image_size"] or vision["image_size"]
    text = _text_config(language)
    return {
        "model_type": NATIVE_TYPE,
        "architectures": ["InternVLForConditionalGeneration"],
        "vision_config": _vision_config(vision),
        "text_config": text,
        "dtype": original.get("torch_dtype") or original.get("dtype"),
        "image_token_id": image_token_id,
        "image_seq_length": round((size // vision["patch_size"] * chat["downsample_ratio"]) ** 2),
        "downsample_ratio": chat["downsample_ratio"],
        "vision_feature_layer": chat["select_layer"],
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
    }


def original_config(native: Mapping[str, Any], chat: Mapping[str, Any]) -> Json:
    """The original ``config.json`` of a native config; ``chat`` are the original's fields about images and
    the template, which the native one has no room for.

    A Llama-form language model becomes InternLM2, which is what InternVL's are.  Raises ModelError for
    a language model that the original layout has no name for."""
    text = dict(native["text_config"])
    architecture = {"llama": INTERNLM2, "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(
        text["model_type"]
    )
    if architecture is None:
        raise ModelError(f"the original layout has no language model of type {text['model_type']!r}")
    back = {new: old for old, new in VISION_NAMES.items()}
    tower = {back.get(name, name): value for name, value in native["vision_config"].items()}
    vision = {name: tower.get(name, default) for name, default in VISION_DEFAULTS.items()}
    for name in ("image_size", "patch_size"):
        side: Any = vision[name]
        vision[name] = side[0] if isinstance(side, list | tuple) else side
    language = _internlm2_config(text) if architecture == INTERNLM2 else text
    return {
        **CHAT_DEFAULTS,
        "ps_version": "v2",
        "force_image_size": vision["image_size"],
        **chat,
        "model_type": ORIGINAL_TYPE,
        "architectures": ["InternVLChatModel"],
        "torch_dtype": native.get("dtype"),
        "downsample_ratio": native["downsample_ratio"],
        "select_layer": native["vision_feature_layer"],
        "vision_config": {**vision, "model_type": "intern_vit_6b"},
        "llm_config": {**language, "architectures": [architecture]},
        "tie_word_embeddings": native["tie_word_embeddings"],
    }


def layout_of(native: Mapping[str, Any], internlm2: bool | None = None) -> Layout:
    """The layout of a native config; Llama-form language models are InternLM2's unless told otherwise."""
    text, width = native["text_config"], native["vision_config"]["hidden_size"]
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    language = Groups(heads, text.get("num_key_value_heads") or heads, head_dim)
    fused = text["model_type"] == "llama" if internlm2 is None else internlm2
    return Layout(fused, language, Groups(1, 1, width))


def is_internlm2(original: Mapping[str, Any]) -> bool:
    return INTERNLM2 in (original["llm_config"].get("architectures") or ())


def _chat_problems(chat: Json, vision: Json) -> list[str]:
    problems = []
    if chat["ps_version"] != "v2":
        problems.append(f"ps_version is {chat['ps_version']!r}; transformers computes 'v2' only")
    if vision["qk_normalization"] and vision["layer_norm_eps"] != NORM_EPS:
        problems.append(f"the tower's qk norm has layer_norm_eps {vision['layer_norm_eps']}, not {NORM_EPS}")
    if chat["dynamic_image_size"] and not chat["use_thumbnail"]:
        problems.append("use_thumbnail is false; transformers adds a thumbnail wherever it tiles")
    return problems


def _language_problems(language: Mapping[str, Any]) -> list[str]:
    problems = []
    names: list[str] = language.get("architectures") or [""]
    if names[0] not in LANGUAGE_TYPES:
        problems.append(f"the language model is {names[0]!r}; known are {', '.join(LANGUAGE_TYPES)}")
    if language.get("rope_pos_id_version", "default") != "default":
        problems.append(f"rope_pos_id_version is {language['rope_pos_id_version']!r}, not 'default'")
    return problems


def _vision_config(vision: Json) -> Json:
    fields = {VISION_NAMES.get(name, name): vision[name] for name in VISION_DEFAULTS}
    return {**fields, "model_type": "internvl_vision", "use_absolute_position_embeddings": True}


def _text_config(language: Mapping[str, Any]) -> Json:
    architecture = language["architectures"][0]
    kind = {"model_type": LANGUAGE_TYPES[architecture]}
    if architecture != INTERNLM2:
        own = {name: value for name, value in language.items() if name not in ("auto_map", "_name_or_path")}
        return own | kind
    fields = {**INTERNLM2_DEFAULTS, **language}
    same = {name: fields[name] for name in INTERNLM2_DEFAULTS if name not in KEPT_AS_THEY_ARE}
    scaling = fields["rope_scaling"]
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": scaling["type"], **scaling}
    rope = {name: value for name, value in rope.items() if name != "type"}
    return {
        **same,
        **kind,
        "num_key_value_heads": fields["num_key_value_heads"] or fields["num_attention_heads"],
        "attention_bias": fields["bias"],
        "rope_parameters": {**rope, "rope_theta": float(fields["rope_theta"])},
    }


def _internlm2_config(text: Json) -> Json:
    rope = dict(text["rope_parameters"])
    kind = rope.get("rope_type", "default")
    language = {name: text.get(name, value) for name, value in INTERNLM2_DEFAULTS.items()}
    return {
        **language,
        "model_type": "internlm2",
        "bias": text.get("attention_bias", False),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
    }
