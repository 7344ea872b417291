"""Tiny GGUF files as llama.cpp's converter writes them, with weights that are the same on every machine.

``make engines`` compares what llama.cpp computes from them with the models of transformers that they are
written from, so that this writer is judged too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import nn

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 512,
}
WINDOW = {"sliding_window": 16}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}
# What a file is called here: GGUF's architecture, transformers' model, and how its config differs.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-tied": ("llama", "llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", "llama", {"head_dim": 32}),
    "llama-base": ("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-llama3": (
        "llama",
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}},
    ),
    "llama-llama3-early": (
        "llama",
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 10000.0, "original_max_position_embeddings": 32}},
    ),
    "llama-linear": (
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn": ("llama", "llama", {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": {**YARN, "rope_theta": 1000000.0}}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("gemma", "gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, **WINDOW},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, **WINDOW},
    ),
    "gemma3-linear": (
        "gemma3",
        "gemma3_text",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, **WINDOW},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("phi3", "phi3", {}),
    "phi3-partly": (
        "phi3",
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "phi3",
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**LONG, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "granite": ("granite", "granite", GRANITE),
    "olmo2": ("olmo2", "olmo2", {}),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 5}),
}
# The same with keys that few files have: a file of MODELS, and what is set.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-named-mistral": ("llama", {"general.name": "mistral", "llama.attention.sliding_window": 8}),
    "llama-old-linear": ("llama", {"llama.rope.scale_linear": 4.0}),
    "llama-factor-alone": ("llama", {"llama.rope.scaling.factor": 2.0}),
    "llama-scaled-by-none": ("llama-linear", {"llama.rope.scaling.type": "none"}),
    "llama-yarn-attention": ("llama-yarn", {"llama.rope.scaling.attn_factor": 1.2}),
    "llama-yarn-no-length": ("llama-yarn", {"llama.rope.scaling.original_context_length": None}),
    "qwen2-yarn-unread": (
        "qwen2-yarn",
        {"qwen2.rope.scaling.yarn_beta_fast": 8.0, "qwen2.rope.scaling.yarn_attn_factor": 2.0},
    ),
    "llama-heads-alike": ("llama-biases", {"llama.attention.head_count_kv": [2, 2, 2, 2]}),
    "gemma2-usual-window": ("gemma2", {"gemma2.attention.sliding_window": None}),
    "gemma3-no-window": ("gemma3", {"gemma3.attention.sliding_window": 0}),
    "gemma3-every-third": ("gemma3", {"gemma3.attention.sliding_window_pattern": 3}),
    "gemma3-near-base": ("gemma3", {"gemma3.rope.freq_base_swa": 500.0}),
}
KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Of K-quants a block holds 256 numbers: a width that all kinds of blocks divide.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
WIDE_GEMMA = WIDE | {"query_pre_attn_scalar": 64, "num_hidden_layers": 7}  # one layer of which sees all
# Families, each of which is written in each of KINDS.
FAMILIES = (*("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite", "olmo2", "smollm3"),)


def tiny_model(name: str, **changes: Any) -> nn.Module:
    """The model of transformers called ``name`` in MODELS, its weights drawn so that every part matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, model_type, own = MODELS[name]
    config = AutoConfig.for_model(model_type, **SIZES | {"tie_word_embeddings": False} | own | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            if key.endswith("norm.weight"):
                around = 0.0 if model_type.startswith("gemma") else 1.0
                parameter.copy_(around + 0.2 * numbers)
            else:
                parameter.copy_(numbers * (1.6 / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 0.1))
    return model


def vocabulary(size: int = 320) -> dict[str, Any]:
    """Every byte, six control tokens, and words of two letters, as byte pairs."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|x|>", "<pad>"]
    letters = "etaoinshrdlu"
    pairs = [(left, right) for left in letters for right in letters][: size - 256 - len(control)]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*bytes_to_unicode().values(), *control, *(left + right for left, right in pairs)],
        "token_type": [1] * 256 + [3] * len(control) + [1] * len(pairs),
        "merges": [" ".join(pair) for pair in pairs],
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def write_gguf(  # noqa: PLR0913
    path: Path,
    model: nn.Module,
    architecture: str,
    *,
    kind: str | dict[str, str] = "F32",
    words: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    left_out: str = "",
) -> Path:
    """``model`` as a GGUF file, its matrices in ``kind``, or in the kind for a name that ends in a key of it;
    the model's weights become what the file says.

    ``words`` are keys of the tokenizer, ``keys`` others to set, or with None to leave out; ``extra`` are
    tensors that no converter would write, and the tensor ``left_out`` is not written."""
    writer = gguf.GGUFWriter(path, architecture)
    settings = {**keys_of(model.config, architecture), **_named("tokenizer.ggml.", words or vocabulary())}
    for key, value in (settings | (keys or {})).items():
        if value is not None:
            _add_key(writer, key, value)
    for name, (data, raw) in {**tensors_of(model, architecture, kind), **(extra or {})}.items():
        if name != left_out:
            writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(path: Path, words: dict[str, Any], architecture: str = "llama", **keys: Any) -> Path:
    """A GGUF file with a tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_named("tokenizer.ggml.", words), **keys}.items():
        _add_key(writer, key, value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


def keys_of(config: Any, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of ``config``: conversion/base.py, TextModel.set_gguf_parameters."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1)),
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "head_dim", None) is not None:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in ("gemma2", "gemma3"):
        found |= {"attention.sliding_window": config.sliding_window}
    if architecture == "gemma2":
        found |= {
            name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")
        }
    if architecture == "granite":
        found |= {
            "logit_scale": float(config.logits_scaling),
            "residual_scale": float(config.residual_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "attention.scale": float(config.attention_multiplier),
        }
    rope = config.rope_parameters
    if "full_attention" in rope:
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    return _named(f"{architecture}.", found | rope_keys(rope, config.max_position_embeddings))


def rope_keys(rope: dict[str, Any], length: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn", "longrope"):
        found["rope.scaling.type"] = rope["rope_type"]
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        scale = length / rope["original_max_position_embeddings"]
        found["rope.scaling.attn_factor"] = float(
            np.sqrt(1 + np.log(scale) / np.log(rope["original_max_position_embeddings"]))
        )
    return found


def tensors_of(
    model: nn.Module, architecture: str, kind: str | dict[str, str]
) -> dict[str, tuple[np.ndarray, Any]]:
    """The tensors and their types; ``model`` gets the weights that the types hold."""
    config = model.config
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found: dict[str, tuple[np.ndarray, Any]] = {}
    for key, parameter in model.named_parameters():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
        turned = architecture in ("llama", "granite", "smollm3")
        count = next((count for part, count in heads.items() if turned and part in name), None)
        assert name is not None, key
        weight = parameter.detach().numpy()
        data, raw = in_kind(weight, kind_of(key, kind) if parameter.dim() > 1 else "F32")
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(gguf.dequantize(data, raw).astype(np.float32)))
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        found[name] = (permuted(data, count) if count else data, raw)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope["rope_type"] == "llama3":
        divisors = llama3_of(rope, head_dim)
        found["rope_freqs.weight"] = (divisors, gguf.GGMLQuantizationType.F32)
    for side in ("long", "short") if rope["rope_type"] == "longrope" else ():
        factors = np.array(rope[f"{side}_factor"], np.float32)
        found[f"rope_factors_{side}.weight"] = (factors, gguf.GGMLQuantizationType.F32)
    return found


def llama3_of(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The divisors of the frequencies by transformers' own formula, which is not the product's."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=dict(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def in_kind(weight: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """``weight`` in one of GGUF's types; K-quants, which gguf cannot make, get blocks of drawn bytes."""
    raw = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return quantize(weight, raw), raw
    numbers, size = gguf.GGML_QUANT_SIZES[raw]
    random = np.random.default_rng(weight.size)
    blocks = random.integers(0, 256, (*weight.shape[:-1], weight.shape[-1] // numbers, size), np.uint8)
    scale, least = np.float16(0.0004), np.float16(0.004)
    if kind == "Q6_K":
        blocks[..., -2:] = np.frombuffer(np.float16(0.00006).tobytes(), np.uint8)
    else:
        blocks[..., :4] = np.frombuffer(scale.tobytes() + least.tobytes(), np.uint8)
    return blocks.reshape(*weight.shape[:-1], -1), raw


def kind_of(key: str, kind: str | dict[str, str]) -> str:
    if isinstance(kind, str):
        return kind
    return next((kind for ending, kind in kind.items() if key.endswith(ending)), "F32")


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: conversion/llama.py, LlamaModel.permute."""
    shape = heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def _named(prefix: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in settings.items()}


def _add_key(writer: Any, key: str, value: Any) -> None:
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    if isinstance(value, (list, tuple)):
        writer.add_array(key, list(value))
    else:
        getattr(writer, f"add_{adders[type(value)]}")(key, value)
