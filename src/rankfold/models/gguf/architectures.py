"""What llama.cpp reads of each architecture's keys, and what transformers calls it.

Each entry was compared with llama.cpp, value by value of the logits (``tests/models/gguf``); sources are
llama.cpp's ``src/models`` and ``conversion``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A key without its architecture, and the field of transformers' config that means the same.
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
REQUIRED = COMMON.keys() - {"attention.head_count_kv"}
# Read beside the table: heads' width, positions, and what must be as it always is.
READ_APART = {
    *("attention.key_length", "attention.value_length", "vocab_size", "attention.causal"),
    *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
}
# They do not bear on what is computed: remarks that no program acts on.
WITHOUT_BEARING = {"rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "embedding_length_out"}
# llama.cpp leaves them unread of these architectures, whatever the model was trained with; that is told.
UNREAD_OF_ALL = {
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# Tensors that are told by the config, or that are worked out anew.
TENSORS_APART = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Architecture:
    """``fields``: keys beside COMMON.  ``fixed``: what llama.cpp does without being told.

    ``turned``: the rows of q and k lie in llama.cpp's order of rotated pairs.  ``norms_of_one``: the weights
    of norms are stored with the 1 that transformers adds.  ``unread``: keys that llama.cpp leaves unread.
    ``partly_turned``: heads may be rotated in part."""

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    turned: bool = False
    norms_of_one: bool = False
    partly_turned: bool = False
    unread: frozenset[str] = frozenset()


SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
GRANITE_SCALES = {
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", turned=True, unread=frozenset(WINDOW)),
    "qwen2": Architecture("qwen2", unread=frozenset(WINDOW)),
    "qwen3": Architecture("qwen3", unread=frozenset(WINDOW)),
    "gemma": Architecture("gemma", norms_of_one=True),
    "gemma2": Architecture("gemma2", SOFTCAPS | WINDOW, {"sliding_window": 4096}, norms_of_one=True),
    "gemma3": Architecture("gemma3_text", SOFTCAPS | WINDOW, norms_of_one=True),
    "phi3": Architecture("phi3", partly_turned=True, unread=frozenset(WINDOW)),
    "granite": Architecture("granite", GRANITE_SCALES, turned=True),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", turned=True),
}
