"""What of a model is computed as one: fewer passes over its numbers, and less kept for the backward."""

from __future__ import annotations

import torch
from torch import nn

from rankfold.files import cache_folder
from rankfold.kernels.forms import name_of, use_numba
from rankfold.models.running.gates import fuse_gates, swiglu_like
from rankfold.models.running.norms import fuse_norms, norm_like
from rankfold.models.running.rotary import fuse_rotary, rotary_like


def fuse(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Fuse what can be in ``model``, whose adapter is on it, and say what, of how many, and what computes it
    in ``dtype``.

    In bfloat16 on a CPU that is Numba, where it is installed: there the matrix products are so fast that the
    passes between them count.  In float32 Numba would save less of a step than its start costs."""
    kinds = [
        (fuse_gates(model), swiglu_like(model), "SwiGLU blocks"),
        (fuse_norms(model), norm_like(model), "RMS norms"),
        (fuse_rotary(model), rotary_like(model), "rotary attentions"),
    ]
    told = ", ".join(f"{fused} of {like} {what}" for fused, like, what in kinds)
    device = next(model.parameters()).device
    if device.type != "cpu" or dtype is None:
        return told
    missing = use_numba(dtype, cache_folder() / "numba") if dtype == torch.bfloat16 else ""
    return f"{told}, by {name_of(device, dtype)}" + (f" ({missing})" if missing else "")
