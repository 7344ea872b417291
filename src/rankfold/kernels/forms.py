"""One table of kernels: by device and number format the functions that compute them.

Each form is a module of the functions that ``Form`` names.  torch's stands where the table has no other."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rankfold.kernels import torch_forms


class Form(Protocol):
    """Elementwise and row by row; no function keeps what it is given, and some use it up, as they say."""

    NAME: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``weight * x / sqrt(mean(x^2) + eps)`` (..., width), and the inverse root (..., 1) in at least
        float32.  Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4."""

    def rms_norm_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """With g = grad * weight and s the inverse: ``s g - x s^3 mean(g x)``."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``.  Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def gated_gradient(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients by gate and by up."""

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., heads, tokens, width) turned by the angles of its tokens (..., 1, tokens, width): halves a
        and b become ``a cos - b sin`` and ``b cos + a sin``.  Su et al. 2021 (arXiv 2104.09864), equation 34,
        with the pairs half a width apart."""

    def rotated_gradient(self, grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The gradient by x."""

    def losses(
        self, logits: Tensor, targets: Tensor, smooth: float, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats of logits (tokens, vocabulary) and targets (tokens), at least float32, and
        where it is wanted its gradient by the logits.  Uses up the logits."""

    def causal_shares(self, scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """``softmax(scale * scores)`` (..., queries, keys) in ``dtype`` over the keys up to each query's own,
        the last query's own being the last key.  Uses up the scores."""

    def causal_shares_gradient(self, grad: Tensor, shares: Tensor, scale: float) -> Tensor:
        """The gradient by the scores.  Uses up ``grad``."""


KERNELS = [name for name in vars(Form) if not name.startswith("_") and name != "NAME"]
_table: dict[tuple[str, torch.dtype], Form] = {}
if hasattr(os, "register_at_fork"):  # OpenMP's threads are gone in the child, and calling them would end it
    os.register_at_fork(after_in_child=_table.clear)


def form_of(*tensors: Tensor) -> Form:
    """What computes with ``tensors``, which are of one device."""
    formats = {tensor.dtype for tensor in tensors}
    if len(formats) > 1:
        return torch_forms
    return _table.get((tensors[0].device.type, formats.pop()), torch_forms)


def name_of(device: torch.device, dtype: torch.dtype) -> str:
    return _table.get((device.type, dtype), torch_forms).NAME


def use_numba(dtype: torch.dtype, cache: Path) -> str:
    """Let Numba compute in ``dtype`` on CPUs from now on, with its compiled loops in ``cache``; why it does
    not, or an empty string."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"numba has no loops for {dtype}"
    if find_spec("numba") is None:
        return "pip install 'rankfold[fast]' for one pass each"
    try:
        from rankfold.kernels import numba_forms
    except ImportError as failure:
        return f"numba cannot be imported: {failure}"
    if problem := numba_forms.start(dtype, cache):
        return problem
    _table["cpu", dtype] = numba_forms
    return ""
