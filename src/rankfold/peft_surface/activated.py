"""Where the activated adapters of a batch begin to count (aLoRA), by PEFT's names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.compat import recomputes_activations
from rankfold.errors import ConfigError
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.lora.layers.registry import adapter_layers
from rankfold.lora.variants.activated import OFFSETS

Offsets = Sequence[int | None]


def calculate_alora_offsets(
    peft_config: Mapping[str, LoraConfig],
    active_adapter: str,
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """For each row of ``input_ids`` (rows, tokens) how many of its last tokens an activated adapter counts
    for: from the last place of its invocation on.  None for a row without one, or of another adapter."""
    if input_ids is None:
        return []
    names = [active_adapter] * len(input_ids) if adapter_names is None else adapter_names
    return [_offset(row, _invocation(peft_config, name)) for row, name in zip(input_ids, names, strict=True)]


def _invocation(configs: Mapping[str, LoraConfig], name: str) -> list[int] | None:
    return configs[name].alora_invocation_tokens if name in configs else None


def _offset(row: Tensor, invocation: list[int] | None) -> int | None:
    if not invocation or len(invocation) > len(row):
        return None
    windows = row.unfold(0, len(invocation), 1)
    found = (windows == torch.tensor(invocation, device=row.device)).all(1).nonzero()
    return len(row) - int(found[-1]) if len(found) else None


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether an adapter of the batch is an activated one."""
    names = [*model.active_adapters, *(adapter_names or ())]
    return any(_invocation(model.peft_config, name) for name in names)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """``kwargs`` with the ``alora_offsets`` of a forward, if the batch has an activated adapter."""
    told = (
        "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this "
        "forward pass."
    )
    return _with_offsets(model, input_ids, kwargs, told if inputs_embeds is not None else "")


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As ``get_alora_offsets_for_forward``, for a prompt; what is written after it all counts."""
    ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
    ids = ids[None] if ids is not None and ids.ndim == 1 else ids
    told = "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA."
    return _with_offsets(model, ids, kwargs, told)


def _with_offsets(model: Any, ids: Tensor | None, kwargs: dict[str, Any], told: str) -> dict[str, Any]:
    names = kwargs.get("adapter_names")
    if kwargs.get("alora_offsets") is not None or not is_alora_relevant_in_batch(model, names):
        return kwargs
    if ids is None and told:
        warnings.warn(told, stacklevel=4)
    found = (
        None
        if ids is None
        else calculate_alora_offsets(model.peft_config, model.active_adapters[0], ids, names)
    )
    return {**kwargs, "alora_offsets": found}


@contextmanager
def activated(model: nn.Module, offsets: Offsets | None, beams: int = 1) -> Iterator[None]:
    """Within the block the activated layers of ``model`` count for the last ``offsets`` tokens of each row.

    Where activations are recomputed they know it until the backward is done, and a second forward before that
    is a ConfigError."""
    if offsets is None:
        yield
        return
    if beams > 1:
        raise ConfigError("Beam search not yet supported for aLoRA.")
    carrying = [layer for _, layer in adapter_layers(model) if OFFSETS in vars(layer)]
    layers = [layer for layer in carrying if not layer.disable_adapters]
    recomputed = torch.is_grad_enabled() and model.training and recomputes_activations(model)
    if recomputed and any(vars(layer)[OFFSETS] is not None for layer in layers):
        raise ConfigError(
            "Multiple invocations of PEFT forward hooks before .backward() with enabled gradient "
            "checkpointing. Disable gradient checkpointing or only call forward once per backward."
        )
    for layer in layers:
        vars(layer)[OFFSETS] = list(offsets)
    try:
        yield
    finally:
        if not recomputed:
            for layer in layers:
                vars(layer)[OFFSETS] = None
