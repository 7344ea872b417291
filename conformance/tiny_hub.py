"""The models of the hub that PEFT's tests name, tiny and with random weights, in a cache folder of the hub's.

HF_HOME=FOLDER python tiny_hub.py"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

PEFT, HF, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
COMMIT = "0" * 40
HEADS: dict[str, Any] = {"num_attention_heads": 4}
SMALL = {
    **HEADS,
    **{"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128},
}
MOE = {**SMALL, "head_dim": 8}
ENCODER = {**HEADS, "vocab_size": 1124, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 37}
GPT = {"vocab_size": 1000, "n_embd": 32, "n_head": 4, "bos_token_id": 98, "eos_token_id": 98}
BART = {
    **{"vocab_size": 1024, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 4},
    **{"decoder_ffn_dim": 4, "max_position_embeddings": 100},
}
OPT = {
    **HEADS,
    **{"vocab_size": 50265, "hidden_size": 16, "ffn_dim": 4, "num_hidden_layers": 5},
    **{"max_position_embeddings": 100, "word_embed_proj_dim": 16},
    **{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
LLAMA = {
    **HEADS,
    **{"vocab_size": 32000, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2},
    "num_key_value_heads": 4,
}
T5 = {
    **{"vocab_size": 1103, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "decoder_start_token_id": 0,
}
NEOX = {**HEADS, "vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 37}
# A class of transformers, its config, and the names under which the tests ask for it.
MODELS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "OPTForCausalLM",
        OPT,
        [
            *(f"{hub}tiny-random-OPTForCausalLM" for hub in (PEFT, HF)),
            *(f"{hub}opt-125m" for hub in (PEFT, "facebook/")),
        ],
    ),
    (
        "GPT2LMHeadModel",
        {**GPT, "n_layer": 5, "n_positions": 512, "pad_token_id": 98},
        [f"{hub}tiny-random-{name}" for hub in (PEFT, HF) for name in ("GPT2LMHeadModel", "gpt2")],
    ),
    ("Qwen2ForCausalLM", SMALL, [f"{PEFT}tiny-dummy-qwen2"]),
    ("LlamaForCausalLM", LLAMA, [f"{hub}tiny-random-LlamaForCausalLM" for hub in (PEFT, HF, TRL)]),
    ("MistralForCausalLM", SMALL, [f"{HF}tiny-random-MistralForCausalLM"]),
    ("Gemma3ForCausalLM", MOE, [f"{HF}tiny-random-Gemma3ForCausalLM"]),
    (
        "GPTJForCausalLM",
        {**GPT, "n_layer": 2, "rotary_dim": 4, "n_positions": 128},
        [f"{PEFT}tiny-random-GPTJForCausalLM"],
    ),
    ("GPTNeoXForCausalLM", NEOX, [f"{PEFT}tiny-random-GPTNeoXForCausalLM"]),
    (
        "BloomForCausalLM",
        {"vocab_size": 1000, "hidden_size": 32, "n_layer": 5, "n_head": 4},
        [f"{PEFT}tiny-random-BloomForCausalLM"],
    ),
    ("MixtralForCausalLM", {**SMALL, "num_local_experts": 8}, [f"{HF}Mixtral-tiny"]),
    (
        "Qwen3MoeForCausalLM",
        {**MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [f"{TRL}tiny-Qwen3MoeForCausalLM"],
    ),
    (
        "GptOssForCausalLM",
        {**MOE, "num_local_experts": 4, "num_experts_per_tok": 2},
        [f"{TRL}tiny-GptOssForCausalLM"],
    ),
    (
        "Llama4ForCausalLM",
        {**MOE, "intermediate_size_mlp": 64, "num_local_experts": 4, "pad_token_id": 0},
        [f"{TRL}tiny-Llama4ForCausalLM"],
    ),
    *((name, ENCODER, [f"{PEFT}tiny-random-{name}"]) for name in ("BertModel", "RobertaModel")),
    *((name, ENCODER, [f"{PEFT}tiny-random-{name}"]) for name in ("DebertaModel", "DebertaV2Model")),
    (
        "BertForSequenceClassification",
        ENCODER,
        [f"{hub}tiny-random-BertForSequenceClassification" for hub in (PEFT, HF)],
    ),
    ("RobertaForSequenceClassification", ENCODER, [f"{PEFT}tiny-random-RobertaForSequenceClassification"]),
    (
        "LlamaForSequenceClassification",
        {**SMALL, "pad_token_id": 0},
        [f"{TRL}tiny-LlamaForSequenceClassification-3.2"],
    ),
    ("BartForConditionalGeneration", BART, [f"{PEFT}tiny-random-BartForConditionalGeneration"]),
    (
        "T5ForConditionalGeneration",
        T5,
        [
            f"{PEFT}tiny-random-t5",
            *(f"{hub}tiny-random-T5ForConditionalGeneration" for hub in (PEFT, HF)),
            f"{PEFT}tiny-random-T5ForConditionalGeneration-calibrated",
        ],
    ),
]


def write(kind: str, options: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    root = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    shutil.rmtree(root, ignore_errors=True)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    model = getattr(transformers, kind)
    model(model.config_class(**options)).save_pretrained(root / "snapshots" / COMMIT)


if __name__ == "__main__":
    for each in MODELS:
        for name in each[2]:
            write(each[0], each[1], name)
