"""Frozen RMS norms as one function each, for what is trained through them."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.compat import looked_into
from rankfold.kernels.rms_norm import rms_norm
from rankfold.lora.layers.linear import FUSED_FROM
from rankfold.models.running.same_code import same_code

DEVICES = ("cpu", "meta")  # a GPU's many launches were not measured


def fuse_norms(model: nn.Module) -> int:
    """Let the RMS norms of ``model`` keep their input only, in its own dtype; how many they are.

    A norm is one whose forward is, to the instruction, that of Llama, which most families of transformers
    have.  What it computes is the same to rounding.  One that is trained, or that something looks into,
    computes as before."""
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    for norm in norms:
        norm.forward = MethodType(_fused_forward, norm)
    return len(norms)


def norm_like(model: nn.Module) -> int:
    """How many modules of ``model`` are called RMS norms."""
    return sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())


def _fused_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if _may_fuse(norm.weight, hidden_states):
        return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
    return cast(Tensor, type(norm).forward(norm, hidden_states))


def _may_fuse(weight: Tensor, x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and x.device.type in DEVICES
        and x.dtype != torch.float64  # which the separate operations would round
        and x.numel() >= FUSED_FROM
        and not looked_into()
    )


def _is_rms_norm(module: nn.Module) -> bool:
    return "forward" not in vars(module) and same_code(type(module).forward, _of_llama)


def _of_llama(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
