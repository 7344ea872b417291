"""Child process: a folder with random weights in the shapes of Llama, and SmolLM2's tokenizer."""

from __future__ import annotations

import torch
from parts.sides import Job, Result, be_child
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.text_side import load_text


def make(job: Job) -> Result:
    shape = job["shape"]
    tokenizer, _, _ = load_text(DEFAULT_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(job["seed"])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(job["base"])
    tokenizer.save_pretrained(job["base"])
    return {"parameters": model.num_parameters()}


if __name__ == "__main__":
    be_child(make)
