"""How fresh factors start: the values of ``init_lora_weights``.

"pissa", "pissa_niter_N" and "olora" take a part of the base weight W into the factors and leave the residual
W - s B A.  The layer then keeps both weights, which costs the size of the weight: the residual lies in
``weight`` while the adapter is applied, the original otherwise, in the buffer ``spare_weight`` the other
of the two.  So a disabled, deleted or unloaded adapter leaves the base that was there, to the bit."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rankfold.errors import ConfigError, bullet_list
from rankfold.lora.config.data_starts import DATA_STARTS, start_from_data
from rankfold.lora.config.lora_config import PISSA, LoraConfig, changes_base
from rankfold.lora.layers.base import AdapterLayer, AdapterSpec

if TYPE_CHECKING:
    from rankfold.lora.layers.factors import LoraLayer

SPLITTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Split:
    """That the start of adapter ``name`` split the base weight; whether the residual is in place now."""

    name: str
    in_place: bool = False


def start_factors(layer: LoraLayer, spec: AdapterSpec) -> None:
    """Give the fresh factors of ``spec.name``, still in the default dtype, their start.

    One seed gives PEFT's values bit for bit.  True and "gaussian" leave the layer's output as it was to
    the last bit, "orthogonal" to the factors' rounding, because there B A = 0 by orthogonality alone.
    The base-changing starts need the base's device and follow in ``split_base``."""
    start = spec.config.init_lora_weights
    if start is False or changes_base(start):
        return
    lora_a, lora_b = (factor.data for factor in layer.factors(spec.name))
    if start == "orthogonal":
        orthogonal(lora_a, lora_b)
        return
    if start is True or start_from_data(start):  # the latter is about to be loaded
        draw_kaiming(lora_a)
    else:
        nn.init.normal_(lora_a, std=1 / spec.rank)
    lora_b.zero_()
    if spec.config.lora_bias:
        nn.init.zeros_(cast(Tensor, layer.lora_B[spec.name].bias))


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


@torch.no_grad()
def split_base(layer: LoraLayer, spec: AdapterSpec) -> None:
    """Take the start's part of the base weight into the factors and keep the residual beside the base.

    All of it is worked out in float32 (float64 for a float64 base); the residual is rounded once.  The
    factors are not rounded to a half-precision base's dtype on the way, as PEFT's are."""
    weight = layer.base_weight().detach()
    transposed = layer.row_dim == 1
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    matrix = matrix.T if transposed else matrix
    lora_a, lora_b = base_part(matrix, str(spec.config.init_lora_weights), spec.rank, spec.scale)
    residual = (matrix - spec.scale * lora_b @ lora_a).to(weight.dtype)
    for parameter, value in zip(layer.factors(spec.name), (lora_a, lora_b), strict=True):
        parameter.copy_(value)
    layer.register_buffer("spare_weight", (residual.T if transposed else residual).contiguous(), False)
    layer.split = Split(spec.name)


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


def place_base(layer: LoraLayer, *, residual: bool) -> None:
    """Put the residual or the original of a split base weight where the layer computes with it.

    The tensors change places, so nothing is copied or rounded.  Under a merge, what ``unmerge`` will
    bring back is exchanged instead."""
    split = cast(Split, layer.split)
    if split.in_place == residual:
        return
    spare = cast(Tensor, layer._buffers["spare_weight"])
    if layer.merged:
        layer._originals["weight"], spare = spare, layer._originals["weight"]
    else:
        weight = cast(nn.Parameter, layer._parameters["weight"])
        weight.data, spare = spare, weight.data
    layer._buffers["spare_weight"], split.in_place = spare, residual


def end_split(layer: LoraLayer) -> None:
    """Make the original weight the layer's only one."""
    place_base(layer, residual=False)
    drop_spare(layer)


def drop_spare(layer: LoraLayer) -> None:
    """Forget whichever of the two weights is not in place."""
    del layer.spare_weight
    layer.split = None


def start_problems(kind: type[AdapterLayer], layer: nn.Module, spec: AdapterSpec) -> list[str]:
    """What keeps ``layer``, plain or adapted, a layer of ``kind`` when adapted, from the start of ``spec``,
    or from DoRA."""
    start, dora, name = spec.config.init_lora_weights, spec.config.use_dora, kind.plain_class.__name__
    problems = []
    if dora and kind.row_dim is None:
        problems.append(f"use_dora is not for a {name}")
    plain = not isinstance(start, str) or start == "gaussian" or start_from_data(start)
    if not plain and not kind.is_matrix:
        problems.append(f"init_lora_weights={start!r} is for linear layers, not for {name}")
    elif start == "orthogonal" and spec.rank % 2:
        problems.append(f"init_lora_weights='orthogonal' needs an even rank, got {spec.rank}")
    elif changes_base(start):
        problems += _splitting_problems(layer, spec.rank)
    if (dora or changes_base(start)) and isinstance(layer, AdapterLayer) and layer.merged:
        problems.append(f"{layer.merged_adapters} are merged into it; unmerge_adapter() first")
    return problems


def _splitting_problems(layer: nn.Module, rank: int) -> list[str]:
    """What keeps a start from taking a part of this rank from the weight of ``layer``."""
    weight, split = cast(nn.Parameter, layer._parameters["weight"]), layer.__dict__.get("split")
    if split is not None:
        return [f"the start of {split.name!r} has changed its base weight already; merge or delete that one"]
    if weight.dtype not in SPLITTABLE:
        return [f"this start changes the base weight, and this one is {weight.dtype}; dequantise it first"]
    if rank > min(weight.shape):
        return [f"rank {rank} exceeds what its weight of {tuple(weight.shape)} can hold"]
    if weight.is_meta or not torch.isfinite(weight).all():
        return ["this start decomposes the base weight, which holds no values, or NaN or infinite ones"]
    return []


def tied_problems(modules: Mapping[str, nn.Module], specs: Mapping[str, AdapterSpec]) -> list[str]:
    """Every target whose weight a start would change while another module uses it too."""
    changed = [target for target, spec in specs.items() if changes_base(spec.config.init_lora_weights)]
    if not changed:
        return []
    uses = Counter(id(p) for module in modules.values() for p in module._parameters.values())
    return [
        f"{target}: its weight is tied to another module's, which init_lora_weights="
        f"{specs[target].config.init_lora_weights!r} would change too"
        for target in changed
        if uses[id(modules[target]._parameters.get("weight"))] > 1
    ]


def refuse_start_from_data(config: LoraConfig) -> None:
    """Raise ConfigError if a new adapter cannot start as ``config`` says, or would pass an option by."""
    start, problems = config.init_lora_weights, []
    if start_from_data(start):
        problems.append(
            f"init_lora_weights={start!r} is read and written by this version of rankfold, and cannot be "
            'started with yet; use True, "pissa", "olora" or "orthogonal"; an adapter that was started so '
            "can be loaded"
        )
    for own, (name, _) in DATA_STARTS.items():
        if getattr(config, name) and start != own:
            problems.append(f"{name} has no effect unless init_lora_weights={own!r}; leave it out")
    if problems:
        raise ConfigError(bullet_list("this adapter cannot be started:", problems))


def changed_base(config: LoraConfig) -> str | None:
    """Why the base that an adapter with ``config`` was trained on cannot be told to be the one at hand."""
    start = config.init_lora_weights
    if start == "eva" or not start_from_data(start):
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
