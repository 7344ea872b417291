"""Products of a large matrix with few rows, as an answer makes them token by token.

There a processor waits for the matrix, and torch's library, made for many rows, reads it slowly on some
processors.  By Numba where that is installed and, as measured once a process, faster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRIED = (64, 32, 16, 8, 4, 2, 1)  # rows
AGAIN = 3
MATRICES = 8  # different ones: one alone would stay in the cache, which a model does not


class _State:
    """``most``: rows up to which ``product`` is faster than torch's; ``uses`` are under way."""

    most = 0
    uses = 0
    is_measured = False
    product: Callable[[Tensor, Tensor], Tensor]
    same_threads: Callable[[], None]


_state = _State()


def _forget() -> None:
    _state.most, _state.is_measured = 0, True  # OpenMP's threads are gone in a fork, and calling them would end it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: x (..., columns), weight (features, columns) -> (..., features).

    Within ``few_rows`` without gradients, in another order of sums."""
    if not _state.uses or not 0 < x.numel() <= _state.most * x.shape[-1] or not _takes(x, weight):
        return F.linear(x, weight, bias)
    out = _state.product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@contextmanager
def few_rows(weights: Sequence[Tensor], cache: Path) -> Iterator[None]:
    """Within the block ``linear`` may compute by Numba, whose compiled loop is kept in the folder ``cache``.
    ``weights`` are some of a model's, to measure with."""
    wide = [weight for weight in weights if weight.dtype == torch.float32][:MATRICES]
    if wide and not _state.is_measured:
        _state.most, _state.is_measured = _measured(wide, cache), True
    if _state.most:
        _state.same_threads()
    _state.uses += 1
    try:
        yield
    finally:
        _state.uses -= 1


def _measured(weights: Sequence[Tensor], cache: Path) -> int:
    if find_spec("numba") is None:
        return 0
    try:
        from rankfold.kernels.numba_forms import prepare_products, product, same_threads
    except ImportError:
        return 0
    if prepare_products(cache):
        return 0
    _state.product, _state.same_threads = product, same_threads
    same_threads()
    columns = {weight.shape[1] for weight in weights}
    for rows in TRIED:
        xs = {width: torch.ones(rows, width) for width in columns}
        ours = _seconds(lambda: [product(xs[w.shape[1]], w) for w in weights])  # noqa: B023
        torchs = _seconds(lambda: [F.linear(xs[w.shape[1]], w) for w in weights])  # noqa: B023
        if ours < torchs:
            return rows
    return 0


@torch.no_grad()
def _seconds(work: Callable[[], Any]) -> float:
    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(AGAIN))
