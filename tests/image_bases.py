"""Tiny random models that see images, as folders, with tokenizers and images of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from internvl_reference import IMAGE_TOKEN, tiny_config, tiny_tensors

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{{- part.text if part.type == 'text' else 'IMAGE' -}}{%- endfor -%}"
    "{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
INTERNVL_WORDS = {
    290: "<|im_start|>",
    291: "<|im_end|>",
    297: "<img>",
    298: "</img>",
    IMAGE_TOKEN: "<IMG_CONTEXT>",
}


def byte_tokenizer(words: dict[int, str], **options: Any) -> Any:
    """A tokenizer of single bytes, with control tokens at the numbers given (from 256 on)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {number: f"<unused{number}>" for number in range(256, max(words) + 1)} | words
    vocabulary = {letter: place for place, letter in enumerate(letters)} | {w: n for n, w in names.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words.values()])
    given = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def write_original(folder: Path, language: str = "internlm2", seed: int = 0, **changes: Any) -> Path:
    """A tiny InternVL in its original layout, with a tokenizer.json."""
    config = tiny_config(language, **changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer(INTERNVL_WORDS).save_pretrained(folder)
    return folder


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """An image of random pixels at ``path``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
