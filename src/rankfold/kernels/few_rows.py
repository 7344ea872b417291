"""Products of large matrices with few rows, as an answer makes them token by token.

There a processor waits for the matrix, and torch's library, made for many rows, reads it slowly on some
processors.  By Numba where that is installed and, as measured once a process, faster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TRIED = (64, 32, 16, 8, 4, 2, 1)  # rows
AGAIN = 3
PART = 1 << 18  # numbers of a weight that are looked at together: they stay in the cache
MATRICES = 8  # different ones: one alone would stay in the cache, which a model does not

NOTHING: tuple[int, Any] = (0, None)
Product = Callable[[Tensor], Tensor]
_products: dict[int, tuple[int, Product]] = {}  # by the weight's id: elements of an input at most
_known: list[tuple[int, Any]] = []  # what was measured: rows up to which Numba is faster, and its module


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: x (..., columns), weight (features, columns) -> (..., features).

    Within ``few_rows`` without gradients, in another order of sums."""
    most, product = _products.get(id(weight), (0, F.linear))
    if (
        not 0 < x.numel() <= most
        or x.dtype is not torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    out: Tensor = product(x)  # type: ignore[call-arg]
    return out if bias is None else out.add_(bias)


def pays(rows: int) -> bool:
    """Whether products with so many rows are made by Numba, which takes little longer than for one row."""
    return bool(_products) and _known[0][0] >= rows


def in_bfloat16(weight: Tensor) -> Tensor | None:
    """The same numbers in bfloat16; None if that would round one of them."""
    narrow = torch.empty_like(weight, dtype=torch.bfloat16)
    for half, part in zip(narrow.view(-1).split(PART), weight.reshape(-1).split(PART), strict=True):
        if not torch.equal(half.copy_(part).float(), part):
            return None
    return narrow


@contextmanager
def few_rows(
    weights: Sequence[Tensor], cache: Path, narrow: Callable[[], Mapping[int, Tensor]] = dict
) -> Iterator[None]:
    """Within the block ``linear`` may compute the products with ``weights`` by Numba, whose compiled loop is
    kept in the folder ``cache``.  ``narrow`` gives, by a weight's id, the same numbers in bfloat16, where
    that rounds none of them: half as much to read."""
    fit = [w for w in weights if w.dtype == torch.float32 and w.is_cpu and w.is_contiguous()]
    if fit and not _known:
        _known.append(_measured(fit[:MATRICES], cache))
    most, numba_forms = _known[0] if fit else NOTHING
    if not most:
        yield
        return
    numba_forms.same_threads()
    before = dict(_products)
    halves = narrow()
    for weight in fit:
        read = numba_forms.product_with(halves.get(id(weight), weight))
        _products[id(weight)] = (most * weight.shape[1], read)
    try:
        yield
    finally:
        _products.clear()
        _products.update(before)


def _forget() -> None:
    """OpenMP's threads are gone in a fork, and calling them would end it."""
    _products.clear()
    _known[:] = [NOTHING]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _measured(weights: Sequence[Tensor], cache: Path) -> tuple[int, Any]:
    if find_spec("numba") is None:
        return NOTHING
    try:
        from rankfold.kernels import numba_forms
    except ImportError:
        return NOTHING
    if numba_forms.prepare_products(cache):
        return NOTHING
    numba_forms.same_threads()
    products = [(numba_forms.product_with(weight), weight) for weight in weights]
    for rows in TRIED:
        xs = {weight.shape[1]: torch.ones(rows, weight.shape[1]) for weight in weights}
        ours = _seconds(lambda: [product(xs[w.shape[1]]) for product, w in products])  # noqa: B023
        torchs = _seconds(lambda: [F.linear(xs[w.shape[1]], w) for w in weights])  # noqa: B023
        if ours < torchs:
            return rows, numba_forms
    return NOTHING


@torch.no_grad()
def _seconds(work: Callable[[], Any]) -> float:
    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(AGAIN))
