"""torch.compile for the decoder layers, while they are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankfold.compat import COMPILER, layers_kept_whole
from rankfold.errors import ConfigError
from rankfold.models.running.rows_apart import keep_out_of_programs


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model that it says must not be torn apart."""
    base = model.get_base_model()
    kinds = layers_kept_whole(base)
    return [module for module in base.modules() if type(module).__name__ in kinds]


def compile_layers(model: Any) -> None:
    """Let torch.compile make one program of each decoder layer of ``model``, for rows of any length.

    All layers share it, which is what keeps its making short.  In eval mode they run as they did: judging
    and generating would each take programs of their own.  Raises ConfigError if there are no such layers."""
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(f"compile: {type(model.get_base_model()).__name__} names no decoder layers")
    keep_out_of_programs()
    for layer in layers:
        _compile(layer)


def _compile(layer: nn.Module) -> None:
    plain = layer.forward
    fast = torch.compile(plain, dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return plain(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__module__.startswith(COMPILER):
                raise ConfigError(f"compile: {_reason(error)}; leave compile out") from error
            raise

    layer.forward = forward


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"torch.compile cannot do it here: {lines[0] if lines else type(error).__name__}"
