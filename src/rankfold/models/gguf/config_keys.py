"""GGUF's keys of a config of transformers: the way back of ``config``."""

from __future__ import annotations

from typing import Any

from rankfold.errors import ModelError
from rankfold.models.gguf.architectures import ARCHITECTURES, COMMON
from rankfold.models.gguf.config import USUAL_PATTERN
from rankfold.models.gguf.rope import rope_keys

# They do not bear on what is computed, or are said elsewhere: tokens, positions, the tensors' numbers.
NOT_COMPARED = {
    *("architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype"),
    *("embd_pdrop", "eos_token_id", "id2label", "initializer_range", "label2id", "model_type"),
    *("name_or_path", "_name_or_path", "original_max_position_embeddings", "output_attentions"),
    *("output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop"),
    *(
        "return_dict",
        "rope_parameters",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "max_window_layers",
    ),
    *("is_llama_config", "rope_interleaved", "use_bidirectional_attention", "transformers.js_config"),
}


def config_keys(config: Any, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of ``config``.  Raises ModelError for positions without words."""
    fields = COMMON | dict(ARCHITECTURES[architecture].fields)
    found = {key: getattr(config, field, None) for key, field in fields.items()}
    found = {key: value for key, value in found.items() if value is not None}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found |= {"attention.key_length": width, "attention.value_length": width}
    found["vocab_size"] = config.vocab_size
    found["rope.dimension_count"] = int(width * config.rope_parameters.get("partial_rotary_factor", 1))
    found |= _windows(config, architecture) | rope_keys(config)
    return {
        "general.name": str(config.name_or_path or architecture).rstrip("/").rpartition("/")[2],
        **{f"{architecture}.{key}": value for key, value in found.items()},
    }


def _windows(config: Any, architecture: str) -> dict[str, Any]:
    """Every how many layers one of a Gemma has no window, where that is not the usual."""
    if architecture not in USUAL_PATTERN:
        return {}
    near = [kind == "sliding_attention" for kind in config.layer_types]
    for every in (USUAL_PATTERN[architecture], *range(2, len(near) + 1)):
        if near == [layer % every < every - 1 for layer in range(len(near))]:
            return {"attention.sliding_window_pattern": every}
    raise ModelError(f"the layers of this {architecture} that see all do not come at equal distances")


def not_said(config: Any, read: Any) -> list[str]:
    """What ``config`` says and a file, from which ``read`` came, does not."""
    own, other = config.to_dict(), read.to_dict()
    return [
        f"{name} is {value!r}, and in the file {other[name]!r}"
        for name, value in own.items()
        if name in other and name not in NOT_COMPARED and not _alike(value, other[name])
    ]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)
