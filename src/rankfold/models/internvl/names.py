"""What each module is called in either layout of InternVL.

Original: ``InternVLChatModel`` of OpenGVLab/InternVL at 2410d1d (``internvl_chat/internvl/model``).
Native: ``InternVLForConditionalGeneration`` of transformers 5.23."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rankfold.models.internvl.groups import Groups

LAYER = re.compile(r"(?<=\blayers\.|.\blayer\.)\d+(?=\.)")
VISION_LAYER, TOWER_LAYER = "vision_model.encoder.layers.N.", "model.vision_tower.encoder.layer.N."
INTERNLM2_LAYER, TEXT_LAYER = "language_model.model.layers.N.", "model.language_model.layers.N."

# Modules and parameters by their original names; a fused one has three native names.
VISION: Mapping[str, tuple[str, ...]] = {
    "vision_model.embeddings.class_embedding": ("model.vision_tower.embeddings.cls_token",),
    "vision_model.embeddings.position_embedding": ("model.vision_tower.embeddings.position_embeddings",),
    "vision_model.embeddings.patch_embedding": ("model.vision_tower.embeddings.patch_embeddings.projection",),
    f"{VISION_LAYER}attn.qkv": tuple(f"{TOWER_LAYER}attention.{part}_proj" for part in "qkv"),
    f"{VISION_LAYER}attn.q_norm": (f"{TOWER_LAYER}attention.q_norm",),
    f"{VISION_LAYER}attn.k_norm": (f"{TOWER_LAYER}attention.k_norm",),
    f"{VISION_LAYER}attn.proj": (f"{TOWER_LAYER}attention.projection_layer",),
    f"{VISION_LAYER}mlp.fc1": (f"{TOWER_LAYER}mlp.fc1",),
    f"{VISION_LAYER}mlp.fc2": (f"{TOWER_LAYER}mlp.fc2",),
    f"{VISION_LAYER}norm1": (f"{TOWER_LAYER}layernorm_before",),
    f"{VISION_LAYER}norm2": (f"{TOWER_LAYER}layernorm_after",),
    f"{VISION_LAYER}ls1": (f"{TOWER_LAYER}lambda_1",),
    f"{VISION_LAYER}ls2": (f"{TOWER_LAYER}lambda_2",),
}
PROJECTOR: Mapping[str, tuple[str, ...]] = {
    "mlp1": ("model.multi_modal_projector",),
    "mlp1.0": ("model.multi_modal_projector.layer_norm",),
    "mlp1.1": ("model.multi_modal_projector.linear_1",),
    "mlp1.3": ("model.multi_modal_projector.linear_2",),
}
# A language model whose layers are called as in transformers: Qwen2, Qwen3, Llama.
TEXT: Mapping[str, tuple[str, ...]] = {
    "language_model.model": ("model.language_model",),
    "language_model.lm_head": ("lm_head",),
}
INTERNLM2: Mapping[str, tuple[str, ...]] = {
    "language_model.model.tok_embeddings": ("model.language_model.embed_tokens",),
    "language_model.model.norm": ("model.language_model.norm",),
    "language_model.output": ("lm_head",),
    f"{INTERNLM2_LAYER}attention.wqkv": tuple(f"{TEXT_LAYER}self_attn.{part}_proj" for part in "qkv"),
    f"{INTERNLM2_LAYER}attention.wo": (f"{TEXT_LAYER}self_attn.o_proj",),
    f"{INTERNLM2_LAYER}feed_forward.w1": (f"{TEXT_LAYER}mlp.gate_proj",),
    f"{INTERNLM2_LAYER}feed_forward.w3": (f"{TEXT_LAYER}mlp.up_proj",),
    f"{INTERNLM2_LAYER}feed_forward.w2": (f"{TEXT_LAYER}mlp.down_proj",),
    f"{INTERNLM2_LAYER}attention_norm": (f"{TEXT_LAYER}input_layernorm",),
    f"{INTERNLM2_LAYER}ffn_norm": (f"{TEXT_LAYER}post_attention_layernorm",),
}


@dataclass(frozen=True)
class Layout:
    """The two names of everything in one model, and how its fused matrices are ordered."""

    internlm2: bool
    language: Groups
    vision: Groups

    @cached_property
    def table(self) -> dict[str, tuple[str, ...]]:
        return {**VISION, **PROJECTOR, **(INTERNLM2 if self.internlm2 else TEXT)}

    @cached_property
    def _reverse(self) -> dict[str, tuple[str, int]]:
        return {native: (name, place) for name, to in self.table.items() for place, native in enumerate(to)}

    def native(self, name: str) -> tuple[str, ...]:
        """The native name of an original module or tensor, or three for a fused one; none if unknown."""
        head, tail, number = _longest(name, self.table)
        return tuple(f"{_numbered(to, number)}{tail}" for to in self.table.get(head, ()))

    def original(self, name: str) -> tuple[str, int] | None:
        """The original name of a native module or tensor, and its place in it (0 unless fused)."""
        head, tail, number = _longest(name, self._reverse)
        if head not in self._reverse:
            return None
        to, place = self._reverse[head]
        return f"{_numbered(to, number)}{tail}", place

    def is_fused(self, original: str) -> bool:
        return len(self.native(original)) > 1

    def groups(self, original: str) -> Groups:
        """The order of rows in a fused matrix of that original name."""
        return self.vision if original.startswith("vision_model.") else self.language


def _longest(name: str, table: Mapping[str, object]) -> tuple[str, str, str]:
    """The longest dotted beginning of ``name`` in ``table``, the rest, and the layer's number."""
    found = LAYER.search(name)
    number = found.group() if found else ""
    spelt = f"{name[: found.start()]}N{name[found.end() :]}" if found else name
    parts = spelt.split(".")
    for end in range(len(parts), 0, -1):
        head = ".".join(parts[:end])
        if head in table:
            rest = spelt[len(head) :]
            return head, rest if ".N." in head else rest.replace(".N.", f".{number}.", 1), number
    return "", name, number


def _numbered(name: str, number: str) -> str:
    return name.replace(".N.", f".{number}.", 1)
