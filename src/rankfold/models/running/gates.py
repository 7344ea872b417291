"""SwiGLU blocks that keep two tensors for the backward where the separate operations keep four."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.compat import looked_into
from rankfold.lora.layers.linear import FUSED_CLASSES, FusedUpdates
from rankfold.models.running.same_code import same_code

SILU = ("SiLU", "SiLUActivation")  # torch's and transformers'


def fuse_gates(model: nn.Module) -> int:
    """Let the SwiGLU blocks of ``model`` whose down projection has an adapter hand it gate and up apart; how
    many they are.

    A block is one whose forward is, to the instruction, that of Llama, which most families of transformers
    have.  What it computes stays the same; ``silu(gate)`` and its product with ``up`` are not kept."""
    blocks = [module for module in model.modules() if _is_swiglu(module)]
    for block in blocks:
        block.forward = MethodType(_gated_forward, block)
    return len(blocks)


def swiglu_like(model: nn.Module) -> int:
    """How many blocks of ``model`` have the parts of a SwiGLU block."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return sum(all(hasattr(module, part) for part in parts) for module in model.modules())


def _gated_forward(block: Any, x: Tensor) -> Tensor:
    gate, up, down = block.gate_proj(x), block.up_proj(x), block.down_proj
    out = down.fused(gate, up) if _may_fuse(down, gate, up) else None
    return cast(Tensor, down(block.act_fn(gate) * up) if out is None else out)


def _may_fuse(down: nn.Module, gate: Tensor, up: Tensor) -> bool:
    alike = type(up) is type(gate) and up.dtype is gate.dtype and up.shape == gate.shape
    hooked = down._forward_pre_hooks or down._forward_hooks
    hooked = hooked or down._backward_pre_hooks or down._backward_hooks
    is_adapted = isinstance(down, FusedUpdates)  # which it ceases to be when the adapter is unloaded
    return is_adapted and alike and not hooked and torch.is_grad_enabled() and not looked_into()


def _is_swiglu(module: nn.Module) -> bool:
    return (
        "forward" not in vars(module)
        and same_code(type(module).forward, _of_llama)
        and type(module.act_fn).__name__ in SILU
        and type(module.down_proj) in FUSED_CLASSES
    )


def _of_llama(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
