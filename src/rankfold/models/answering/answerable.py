"""What a model must be like to be answered with by the loop."""

from __future__ import annotations

import inspect
from typing import Any

from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.peft_surface import PeftModel

ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
NEEDED = {"position_ids", "past_key_values", "attention_mask"}


def plain_model(model: Any) -> Any:
    """The model of transformers, with the adapters that are on it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_of(model: Any) -> float:
    """How many tokens the model can read and write; endless if its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def why_not(base: Base, sampling: Sampling) -> str:
    """Why this loop cannot answer so, or an empty string."""
    model = plain_model(base.model)
    config = model.config.get_text_config()
    if sampling.settled(model) is None:
        return "the base's own settings ask for more than drawing token by token"
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return f"a {type(model).__name__} does not keep keys and values of all tokens"
    if not what_it_takes(model) >= NEEDED:
        return f"a {type(model).__name__} does not take positions, a mask and a cache"
    if odd := {*(getattr(config, "layer_types", None) or ())} - ATTENTIONS:
        return f"its layers are of kinds with a memory of their own ({', '.join(sorted(odd))})"
    if base.processor is not None and "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return "its positions have several dimensions"
    activated = "an activated adapter counts from a place in the prompt on"
    return activated if is_activated(base.model) else ""


def is_activated(model: Any) -> bool:
    """Whether an adapter of ``model`` is an activated one (aLoRA)."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    return any(config.alora_invocation_tokens for config in configs.values())


def what_it_takes(model: Any) -> frozenset[str]:
    """The names of what a forward of ``model`` can be given."""
    return frozenset(inspect.signature(model.forward).parameters)
