"""How fresh factors start: the values of ``init_lora_weights``, as functions of tensors."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from typing import cast

import torch
from torch import Tensor

from rankfold.lora.config.data_starts import start_from_data
from rankfold.lora.config.lora_config import PISSA, LoraConfig


def start_factors(lora_a: Tensor, lora_b: Tensor, start: bool | str, rank: int) -> None:
    """Give fresh factors A (rank, in, ...) and B (out, rank, ...) their start, in place.

    One seed gives PEFT's values bit for bit.  True and "gaussian" leave the layer's output as it was to
    the last bit, "orthogonal" to the factors' rounding, because there B A = 0 by orthogonality alone."""
    if start == "orthogonal":
        orthogonal(lora_a, lora_b)
        return
    if start is True or start_from_data(start):  # the latter is about to be loaded
        draw_kaiming(lora_a)
    else:
        lora_a.normal_(std=1 / rank)
    lora_b.zero_()


def draw_kaiming(weight: Tensor) -> None:
    """``nn.init.kaiming_uniform_(weight, a=sqrt(5))`` without autograd, bit for bit, and faster."""
    bound = _kaiming_bound(weight.shape[1:].numel())
    weight.uniform_(-bound, bound)


@cache
def _kaiming_bound(fan_in: int) -> float:
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    return math.sqrt(3.0) * (gain / math.sqrt(fan_in))


def orthogonal(lora_a: Tensor, lora_b: Tensor) -> None:
    """Random A (rank, in) and B (out, rank), in place, whose rows and columns lie in two halves of the
    rank's space that are orthogonal to each other; https://datta0.github.io/posts/rethink-lora-init."""
    rank = lora_a.shape[0]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    lora_a.copy_(torch.randn(lora_a.shape[1], rank // 2).mm(basis[0::2]).T / 10.0)
    lora_b.copy_(torch.randn(rank // 2, lora_b.shape[0]).T.mm(basis[1::2]) / 10.0)


def base_part(matrix: Tensor, start: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank); ``scale * B A`` is the start's part of ``matrix`` (out, in).

    "pissa": the largest ``rank`` singular triplets, exactly.  "pissa_niter_N": the same by randomised
    subspace iteration (Halko et al. 2011) without oversampling: the residual makes up for all it misses,
    so the start is exact, but B A is not the best approximation, and depends on the random state.
    "olora": the first ``rank`` columns of Q and rows of R, unscaled; so ``scale`` times their product.
    Meng et al. 2024 (arXiv 2404.02948), Buyukakyuz 2024 (arXiv 2406.01775)."""
    if start == "olora":
        q, r = torch.linalg.qr(matrix)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    found = cast(re.Match[str], PISSA.fullmatch(start))
    if found[1] is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(matrix, rank, niter=int(found[1]))
        vh = v.T
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def minor_directions(matrix: Tensor, rank: int) -> Tensor:
    """B (out, rank) of MiCA: the left singular vectors of ``matrix`` (out, in) of the smallest singular
    values.  A starts at zero, and B is not trained; arXiv 2604.01694."""
    left: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return left[:, -rank:].contiguous()


def changed_base(config: LoraConfig) -> str | None:
    """Why the base that an adapter with ``config`` was trained on cannot be told to be the one at hand."""
    start = config.init_lora_weights
    if start in ("eva", "loftq") or not start_from_data(start):
        return None
    return (
        f"init_lora_weights={start!r} changed the base weights before training, and the change is not in "
        "the file: load it onto the base as it was after that start and allow 'base', or let PEFT convert "
        "the adapter (save_pretrained with path_initial_model_for_weight_conversion)"
    )


def warn_if_random(config: LoraConfig) -> None:
    """Warn that the residual of an adapter being loaded depends on the random state.

    The file holds the trained factors, not the residual they were trained on, which is made again."""
    found = PISSA.fullmatch(str(config.init_lora_weights))
    if found is not None and found[1] is not None:
        warnings.warn(
            f"init_lora_weights={config.init_lora_weights!r} splits the base weights by a randomised SVD: "
            "the result is the trained model only if the random state is the one in which the adapter was "
            "made; save such an adapter with path_initial_model_for_weight_conversion",
            stacklevel=4,
        )
