"""Rotary positions of query and key as one function each, for what is trained through them."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.compat import looked_into
from rankfold.kernels.rotary import rotary
from rankfold.lora.layers.linear import FUSED_FROM
from rankfold.models.running.same_code import same_code

CALLED = "apply_rotary_pos_emb"  # what transformers' attention calls, by this name, in every family


def fuse_rotary(model: nn.Module) -> int:
    """Let the attention layers of ``model`` turn query and key in one pass each; how many they are.

    A layer is one whose forward calls a function that is, to the instruction, Llama's.  What it computes is
    the same to rounding.  The layer's forward keeps its code and sees another function by that name."""
    layers = [module for module in model.modules() if _turns(module)]
    for layer in layers:
        own = type(layer).forward
        seen = {**own.__globals__, CALLED: _turned}
        forward = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        layer.forward = MethodType(forward, layer)
    return len(layers)


def rotary_like(model: nn.Module) -> int:
    """How many modules of ``model`` call a function of that name."""
    forwards = (getattr(type(module).forward, "__code__", None) for module in model.modules())
    return sum(code is not None and CALLED in code.co_names for code in forwards)


def _turns(module: nn.Module) -> bool:
    forward = type(module).forward
    return (
        "forward" not in vars(module)
        and isinstance(forward, FunctionType)
        and CALLED in forward.__code__.co_names
        and same_code(forward.__globals__.get(CALLED), _of_llama)
        and same_code(forward.__globals__[CALLED].__globals__.get("rotate_half"), rotate_half)
    )


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if unsqueeze_dim == 1 and all(_may_fuse(x, cos, sin) for x in (q, k)):
        return rotary(q, cos, sin), rotary(k, cos, sin)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def _may_fuse(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type in ("cpu", "meta")
        and x.dtype == cos.dtype == sin.dtype
        and x.shape[-1] == cos.shape[-1] == sin.shape[-1]
        and not cos.requires_grad
        and not sin.requires_grad
        and x.numel() >= FUSED_FROM
        and not looked_into()
    )


def _of_llama(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
    """Query and key turned, as transformers does it."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def rotate_half(x: Any) -> Any:
    """The halves of ``x`` swapped, one of them negated, as transformers does it."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
