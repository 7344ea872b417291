"""What an adapter of mlx-lm and mlx-vlm is made of: ``adapters.safetensors`` and a config of their own.

Their layers hold ``lora_a`` (in, rank) and ``lora_b`` (rank, out), DoRA's magnitudes as ``m``, and all of
them have one rank and one scale (mlx_lm/tuner/lora.py and dora.py).  Which modules become such layers is
said by ``keys``: dotted names inside a block, for the last ``num_layers`` blocks, or whole dotted names
(``linear_to_lora_layers`` in mlx_lm/tuner/utils.py; mlx_vlm/trainer/peft/utils.py knows whole ones only)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rankfold.lora import LoraConfig
from rankfold.lora.files.adapter_metadata import AdapterMetadata
from rankfold.lora.files.adapter_reader import WEIGHTS_NAME

MLX_WEIGHTS = "adapters.safetensors"
RECORD = "rankfold"  # beside mlx's own keys: the config that the adapter had, to come back to it
MAGNITUDE = "lora_magnitude_vector"

# Text models whose modules mlx-lm calls as transformers does (mlx_lm/models; Mistral is its Llama).
TEXT_TYPES = (
    *("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("granite", "olmo2", "phi3", "starcoder2", "cohere", "cohere2", "stablelm", "helium"),
)
# The beginnings of names in transformers' InternVL, and in mlx_vlm/models/internvl.
NATIVE_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.lm_head",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True)
class MlxBase:
    """What of a base decides how its adapters are written: ``blocks``, how many it has, and whether the head
    uses the embeddings' weight (``tied``).  ``sees_images``: it is mlx-vlm's, not mlx-lm's.
    ``renamed``: beginnings of module names, ours and mlx's, where they differ."""

    blocks: int
    tied: bool
    sees_images: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def mlx_name(self, path: str) -> str:
        return _with_other_beginning(path, self.renamed)

    def own_name(self, path: str) -> str:
        return _with_other_beginning(path, {mlx: own for own, mlx in self.renamed.items()})


@dataclass(frozen=True)
class Unpacked:
    """An adapter as PEFT's files have it."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    facts: AdapterMetadata


def is_mlx(folder: Path) -> bool:
    return (folder / MLX_WEIGHTS).is_file() and not (folder / WEIGHTS_NAME).is_file()


def _with_other_beginning(path: str, table: Mapping[str, str]) -> str:
    old = next((beginning for beginning in table if path.startswith(beginning)), "")
    return table[old] + path.removeprefix(old) if old else path
