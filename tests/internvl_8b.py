"""InternVL2_5-8B's config.json in the original layout, without what no reader of it needs."""

from __future__ import annotations

import json
from pathlib import Path

from internvl_reference import tiny_config

LANGUAGE = {
    "vocab_size": 92553,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
PARAMETERS = 8_075_365_376


def config_8b(**changes) -> dict:
    config = tiny_config(force_image_size=448, torch_dtype="bfloat16", **changes)
    config["llm_config"] |= LANGUAGE
    config["vision_config"] |= TOWER
    return config


def write_config_8b(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_8b(**changes)))
    return folder
