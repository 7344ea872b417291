"""The fused kernels of this installation against torch's, on random numbers of odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankfold.files import cache_folder
from rankfold.kernels import torch_forms
from rankfold.kernels.forms import KERNELS, Form, form_of, use_numba

ROWS, WIDTH, HEADS = 37, 114, 3
FORMAT = torch.bfloat16  # in which another form than torch's computes
ROUNDING = 2**-6  # of the largest number: two roundings of bfloat16 in another order


def kernels_apart() -> dict[str, float]:
    """The largest difference of each kernel to torch's, as a share of the largest number; nothing where
    torch's own are used."""
    if use_numba(FORMAT, cache_folder() / "numba"):
        return {}
    form = form_of(torch.zeros(1, dtype=FORMAT))
    calls = _calls()
    return {
        f"{name} in bfloat16 by {form.NAME}": max(
            float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            for ours, theirs in zip(calls[name](form), calls[name](torch_forms), strict=True)
        )
        for name in KERNELS
    }


def _calls() -> dict[str, Callable[[Form], tuple[Tensor, ...]]]:
    """Each kernel on numbers of its own, which it may use up."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = FORMAT) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, y, z, weight = random(ROWS, WIDTH), random(ROWS, WIDTH), random(ROWS, WIDTH), random(WIDTH)
    heads, cos, sin = random(HEADS, ROWS, WIDTH), random(1, ROWS, WIDTH), random(1, ROWS, WIDTH)
    scores = random(HEADS, ROWS, ROWS + 5, dtype=torch.float32)
    shares, arrived = torch_forms.causal_shares(scores.clone(), 0.5, FORMAT), random(*scores.shape)
    targets, inverse = torch.arange(ROWS), torch.rand(ROWS, 1, generator=generator)
    return {
        "rms_norm": lambda form: form.rms_norm(x, weight, 1e-5),
        "rms_norm_gradient": lambda form: (form.rms_norm_gradient(y, x, weight, inverse),),
        "gated": lambda form: (form.gated(x, y),),
        "gated_gradient": lambda form: form.gated_gradient(z, x, y),
        "rotated": lambda form: (form.rotated(heads, cos, sin),),
        "rotated_gradient": lambda form: (form.rotated_gradient(heads, cos, sin),),
        "losses": lambda form: form.losses(x.clone(), targets, 0.1, True),
        "causal_shares": lambda form: (form.causal_shares(scores.clone(), 0.5, FORMAT),),
        "causal_shares_gradient": lambda form: (form.causal_shares_gradient(arrived.clone(), shares, 0.5),),
    }
