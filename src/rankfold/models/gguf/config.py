"""transformers' config of a GGUF file, every key of which is read, or refused by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rankfold.errors import ModelError, bullet_list
from rankfold.models.gguf.architectures import (
    ARCHITECTURES,
    COMMON,
    READ_APART,
    REQUIRED,
    UNREAD_OF_ALL,
    WITHOUT_BEARING,
    Architecture,
)
from rankfold.models.gguf.file import GgufFile
from rankfold.models.gguf.rope import rope_parameters

EMBEDDING = "token_embd.weight"
# Gemma's largest models scale attention by the mean width of a head, not by its own (gemma2.cpp, gemma3.cpp).
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
USUAL_PATTERN = {"gemma2": 2, "gemma3": 6}  # every how many layers one has no window


def gguf_config(file: GgufFile, tokens: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The config with the ids of special ``tokens``, and what a user should know of how it was read.

    Raises ModelError naming every key that is missing, that is not known, or that asks for what this
    architecture's model in transformers does not do."""
    from transformers import AutoConfig

    architecture = ARCHITECTURES[file.architecture]
    notes: list[str] = []
    problems = _problems(file, architecture)
    if problems:
        raise ModelError(bullet_list(f"{file.path.name} cannot be read as llama.cpp reads it:", problems))
    known = {**COMMON, **architecture.fields}
    fields: dict[str, Any] = {**tokens, **architecture.fixed}
    fields |= {name: _one(file.own(key)) for key, name in known.items() if file.own(key) is not None}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields["head_dim"] = _head_dim(file)
    fields["vocab_size"] = file.tensors[EMBEDDING].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    fields["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    try:
        fields["rope_parameters"], told = rope_parameters(file, fields["head_dim"])
    except ModelError as error:
        raise ModelError(f"{file.path.name} cannot be read as llama.cpp reads it: {error}") from error
    notes += [told] if told else []
    if "original_max_position_embeddings" in fields["rope_parameters"] and file.architecture == "phi3":
        original = fields["rope_parameters"]["original_max_position_embeddings"]
        fields["original_max_position_embeddings"] = original
    if file.architecture in USUAL_PATTERN:
        _windows(file, fields)
    unread = sorted(key for key in {*architecture.unread, *UNREAD_OF_ALL} if file.own(key))
    notes += [
        f"{file.architecture}.{key} = {file.own(key)} is left unread, as by llama.cpp" for key in unread
    ]
    return AutoConfig.for_model(architecture.model_type, **fields), notes


def _problems(file: GgufFile, architecture: Architecture) -> list[str]:
    prefix = f"{file.architecture}."
    own = [key.removeprefix(prefix) for key in file.keys if key.startswith(prefix)]
    known = {*COMMON, *architecture.fields, *READ_APART, *WITHOUT_BEARING}
    known |= {*UNREAD_OF_ALL, *architecture.unread}
    if file.architecture in USUAL_PATTERN:
        known |= {"attention.sliding_window_pattern", "rope.freq_base_swa"}
    # Experts are told by their number, also where there are none.
    unknown = [
        key for key in own if key not in known and not (key.startswith("expert_") and not file.own(key))
    ]
    problems = [f"the key {prefix}{key} is missing" for key in sorted(REQUIRED - {*own})]
    problems += [
        f"the key {prefix}{key} = {str(file.own(key))[:60]} is none that is known" for key in unknown
    ]
    problems += [
        f"{prefix}{key} is another one in each layer, which {architecture.model_type} is not"
        for key in own
        if key in COMMON and isinstance(file.own(key), list) and len({*file.own(key)}) > 1
    ]
    if EMBEDDING not in file.tensors:
        problems.append(f"the tensor {EMBEDDING} is missing")
    problems = problems or [f"{prefix}{problem}" for problem in _not_of_the_tensors(file)]
    return problems or [f"{prefix}{problem}" for problem in _not_done(file, architecture)]


def _not_of_the_tensors(file: GgufFile) -> list[str]:
    """Numbers of the keys that are not those of the tensors: a damaged file may ask for any size."""
    numbers = {key: _one(file.own(key)) for key in COMMON if file.own(key) is not None}
    problems = [
        f"{key} is {value!r}"
        for key, value in numbers.items()
        if not isinstance(value, int | float) or not 0 < value < math.inf
    ]
    if problems:
        return problems
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    width = file.tensors[EMBEDDING].shape[-1]
    if numbers["block_count"] != len(blocks):
        problems.append(
            f"block_count is {numbers['block_count']}, and there are tensors of {len(blocks)} blocks"
        )
    if numbers["embedding_length"] != width:
        problems.append(
            f"embedding_length is {numbers['embedding_length']}, and the embedding is {width} wide"
        )
    if query := file.tensors.get("blk.0.attn_q.weight"):
        heads = numbers["attention.head_count"]
        whole = file.own("attention.key_length", width // heads) * heads
        if whole != query.shape[0]:
            problems.append(f"attention.head_count is {heads}, and the queries are {query.shape[0]} wide")
    return problems


def _not_done(file: GgufFile, architecture: Architecture) -> list[str]:
    """Values of known keys that transformers' model of this architecture cannot do."""
    problems = []
    if file.own("attention.causal") is False:
        problems.append("attention.causal is false: this is no model that continues text")
    if file.architecture == "granite" and file.own("rope.scaling.finetuned") is False:
        problems.append("rope.scaling.finetuned is false, which means no rotary positions")
    widths = {file.own(key) for key in ("attention.key_length", "attention.value_length")} - {None}
    if len(widths) > 1:
        problems.append(f"attention.key_length and value_length differ: {sorted(widths)}")
    turned, whole = file.own("rope.dimension_count"), _head_dim(file)
    if turned not in (None, whole) and not architecture.partly_turned:
        problems.append(f"rope.dimension_count is {turned}, and heads are {whole} wide")
    return problems


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _head_dim(file: GgufFile) -> int:
    usual = file.own("embedding_length") // _one(file.own("attention.head_count"))
    return int(file.own("attention.key_length", usual))


def _windows(file: GgufFile, fields: dict[str, Any]) -> None:
    """Which layers of a Gemma see how far, and how attention is scaled."""
    layers = fields["num_hidden_layers"]
    large = layers == LAYERS_OF_27B[file.architecture]
    fields["query_pre_attn_scalar"] = (
        fields["hidden_size"] // fields["num_attention_heads"] if large else fields["head_dim"]
    )
    pattern = file.own("attention.sliding_window_pattern", USUAL_PATTERN[file.architecture])
    if isinstance(pattern, int):
        pattern = [pattern > 0 and layer % pattern < pattern - 1 for layer in range(layers)]
    if not fields.get("sliding_window"):
        pattern, fields["sliding_window"] = [False] * layers, fields["max_position_embeddings"]
    fields["layer_types"] = ["sliding_attention" if near else "full_attention" for near in pattern[:layers]]
    if file.architecture == "gemma3":
        near = {"rope_type": "default", "rope_theta": float(file.own("rope.freq_base_swa", 10_000.0))}
        fields["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": near}
