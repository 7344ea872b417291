"""Tiny models with random weights of transformers' architectures, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
OLD_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4}

# Architecture -> what its config needs beyond SIZES; windows shorter than the tests' rows.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "GPT2": OLD_NAMES,
    "GPTJ": {**OLD_NAMES, "rotary_dim": 4},  # its head has a bias
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Llama4Text": {
        "head_dim": 8,
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
    },
}


def tiny(architecture: str, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**SIZES, **ARCHITECTURES[architecture])
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
