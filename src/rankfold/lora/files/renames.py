"""Following the names of a model's modules from one transformers release to the next."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rankfold.errors import ConfigError
from rankfold.lora.layers.registry import base_modules

PREFIX = "base_model.model."


def renamed(
    tensors: Mapping[str, Tensor], model: nn.Module, key_mapping: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """``tensors`` under the names that ``model`` has today, and the names that came out twice.

    ``key_mapping`` is applied to every key, as in PEFT; None means the model's own
    ``_checkpoint_conversion_mapping``.  After that a key whose module the model does not have goes through
    transformers' renames for this model type, and is changed only if they lead to a module."""
    mapping = getattr(model, "_checkpoint_conversion_mapping", None) if key_mapping is None else key_mapping
    modules = {name for name, _ in base_modules(model)}
    follow: Callable[[str], str] | None = None
    result: dict[str, Tensor] = {}
    doubled = []
    for key, tensor in tensors.items():
        name = _mapped(key.removeprefix(PREFIX), mapping or {})
        if not _has_module(name, modules):
            follow = follow or transformers_renames(model)
            today = follow(name)
            name = today if _has_module(today, modules) else name
        new = f"{PREFIX}{name}" if key.startswith(PREFIX) else name
        doubled += [new] if new in result else []
        result[new] = tensor
    return result, doubled


def _mapped(key: str, mapping: Mapping[str, str]) -> str:
    for pattern, replacement in mapping.items():
        try:
            new, count = re.subn(pattern, replacement, key)
        except re.error as error:
            raise ConfigError(
                f"key_mapping: {pattern!r} to {replacement!r} cannot be used: {error}"
            ) from error
        if count:
            return new
    return key


def _has_module(key: str, modules: set[str]) -> bool:
    """Whether the module that a key belongs to exists, wrappers of PEFT in its path left out."""
    path = re.split(r"\.lora_|\.token_adapter\.", key)[0] if ".lora_" in key else key.rpartition(".")[0]
    return path.replace(".base_layer", "") in modules


def transformers_renames(model: nn.Module) -> Callable[[str], str]:
    """transformers' own renaming of old checkpoint keys for ``model``, if it is a model of that library.

    The library is not imported: it is there if the model is one of its own."""
    library: Any = sys.modules.get("transformers.conversion_mapping")
    if library is None or not hasattr(getattr(model, "config", None), "model_type"):
        return lambda key: key
    steps = [
        step
        for step in library.get_model_conversion_mapping(model, add_legacy=False)
        if len(step.source_patterns) == 1 and not hasattr(step, "operations")
    ]

    def follow(key: str) -> str:
        for step in steps:
            key, _ = step.rename_source_key(key)
        return str(key)

    return follow
