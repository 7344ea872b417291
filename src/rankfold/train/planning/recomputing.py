"""Activations that are computed again in the backward instead of being kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankfold.errors import ConfigError
from rankfold.models.base.heap import keep_large_blocks_apart


@dataclass(frozen=True)
class Activations:
    """Whether what a layer computes is computed again in the backward instead of being kept, and why."""

    recomputed: bool
    reason: str


def can_recompute(model: Any) -> bool:
    return bool(getattr(model.get_base_model(), "supports_gradient_checkpointing", False))


def recompute_activations(model: Any) -> None:
    """Let each decoder layer of ``model`` keep its input only, and compute the rest again in the backward
    (Chen et al. 2016, arXiv 1604.06174), and large tensors no pages that others could not use.  Raises
    ConfigError if the model cannot."""
    base = model.get_base_model()
    if not can_recompute(model):
        raise ConfigError(f"activation_checkpointing: {type(base).__name__} has no layers that can do it")
    base.activation_checkpointing_enable({"use_reentrant": False})
    keep_large_blocks_apart(True)
    base.disable_input_require_grads()  # which only the reentrant kind needs, and a backward pays for
