"""Following the names of a model's modules from one transformers release to the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rankfold.compat import earlier_names, renames_one_by_one
from rankfold.errors import ConfigError
from rankfold.lora.config.names import PREFIX
from rankfold.lora.layers.registry import base_modules


def renamed(
    tensors: Mapping[str, Tensor], model: nn.Module, key_mapping: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """``tensors`` under the names that ``model`` has today, and the names that came out twice.

    ``key_mapping`` is applied to every key, as in PEFT; None means the model's own
    ``_checkpoint_conversion_mapping``.  After that a key whose module the model does not have goes through
    transformers' renames for this model type, and is changed only if they lead to a module."""
    mapping = earlier_names(model) if key_mapping is None else key_mapping
    modules = {name for name, _ in base_modules(model)}
    follow: Callable[[str], str] | None = None
    result: dict[str, Tensor] = {}
    doubled = []
    for key, tensor in tensors.items():
        name = _mapped(key.removeprefix(PREFIX), mapping or {})
        if not _has_module(name, modules):
            follow = follow or renames_one_by_one(model)
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
