"""The kernels by Numba: on a CPU, in float32 and bfloat16, one pass each over their numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core.errors import NumbaError
from numba.extending import is_jitted
from torch import Tensor

from rankfold.kernels import numba_loops as loops
from rankfold.kernels import numba_products as products

NAME = f"numba {numba.__version__}"
LAYERS = ("omp", "tbb")  # numba's third way to spread a loop over threads may not be used by two at once


def start(dtype: torch.dtype, cache: Path) -> str:
    """Make ready to compute in ``dtype``, keeping compiled loops in the folder ``cache`` if that can be
    written, and nowhere else; why it is not possible, or an empty string."""
    return _prepare(loops, cache, lambda: _compile(dtype))


def prepare_products(cache: Path) -> str:
    """The same for ``product_with``."""
    one = torch.ones(1, 1)
    return _prepare(products, cache, lambda: [product_with(w)(one) for w in (one, one.bfloat16())])


def _prepare(module: Any, cache: Path, compile_all: Callable[[], object]) -> str:
    if _is_writable(cache):
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache)
        for loop in vars(module).values():
            if is_jitted(loop) and loop.targetoptions.get("parallel"):
                loop.enable_caching()
        numba.config.CACHE_DIR = before
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = LAYERS[0]
    threads = torch.get_num_threads()
    try:
        compile_all()
    except (ValueError, OSError, NumbaError) as failure:  # no such layer, a full disk, an unknown processor
        return f"numba cannot compute here: {failure}"
    finally:
        torch.set_num_threads(threads)  # Numba starts all that it may, in the OpenMP that is torch's too
    layer = numba.threading_layer()
    return "" if layer in LAYERS else f"numba spreads loops by {layer}, which may not be used by two at once"


def _compile(dtype: torch.dtype) -> None:
    """Every loop, so that no step waits for one and none fails in a run."""
    x = torch.ones(2, 2, dtype=dtype)
    _, inverse = rms_norm(x, x[0], 1.0)
    rms_norm_gradient(x, x, x[0], inverse)
    gated_gradient(gated(x, x), x, x)
    rotated(x[None], x, x)
    losses(x.clone(), torch.zeros(2, dtype=torch.long), 0.0, True)
    shares = causal_shares(torch.ones(1, 2, 2), 1.0, dtype)
    causal_shares_gradient(x[None].clone(), shares, 1.0)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    out, inverse = torch.empty_like(rows), rows.new_empty(len(rows), dtype=torch.float32)
    _run(loops.rms_norm, rows, weight, np.float32(eps), out, inverse)
    return out.view(x.shape), inverse.view(*x.shape[:-1], 1)


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    rows = _rows(x)
    out = torch.empty_like(rows)
    _run(loops.rms_norm_gradient, _rows(grad), rows, weight, inverse.view(-1), out)
    return out.view(x.shape)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    rows = _rows(gate)
    out = torch.empty_like(rows)
    _run(loops.gated, rows, _rows(up), out)
    return out.view(gate.shape)


def gated_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(gate)
    by_gate, by_up = torch.empty_like(rows), torch.empty_like(rows)
    _run(loops.gated_gradient, _rows(grad), rows, _rows(up), by_gate, by_up)
    return by_gate.view(gate.shape), by_up.view(gate.shape)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Models lay x out tokens first, and so is what is given."""
    heads, tokens, width = x.shape[-3:]
    rows = x.transpose(-3, -2).contiguous()
    out = torch.empty_like(rows)
    angles = (each.expand(*x.shape[:-3], 1, tokens, width).reshape(-1, width) for each in (cos, sin))
    _run(loops.rotated, rows.view(-1, heads, width), *angles, out.view(-1, heads, width))
    return out.transpose(-3, -2)


def rotated_gradient(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(grad, cos, sin.roll(sin.shape[-1] // 2, -1).neg_())


def losses(logits: Tensor, targets: Tensor, smooth: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    found = logits.new_empty(len(logits), dtype=torch.float32)
    logits = logits.contiguous()
    _run(loops.losses, logits, targets, np.float32(smooth), with_gradient, found)
    return found, logits


def causal_shares(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(scores, dtype=dtype)
    _run(loops.causal_shares, scores.flatten(0, -3), np.float32(scale), out.flatten(0, -3))
    return out


def causal_shares_gradient(grad: Tensor, shares: Tensor, scale: float) -> Tensor:
    grad = grad.contiguous()
    _run(loops.causal_shares_gradient, grad.flatten(0, -3), shares.flatten(0, -3), np.float32(scale))
    return grad


def product_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """``x weight^T`` for few rows of float32 x (..., columns), ``weight`` in float32 or bfloat16: prepared
    once, as calling it takes as long as the product with a small matrix."""
    numbers = _array(weight)
    features, columns = numbers.shape
    empty, loop = torch.empty, products.few_rows

    def product(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        out = empty((*x.shape[:-1], features))
        loop(x.view(-1, columns).numpy(), numbers, out.view(-1, features).numpy())
        return out

    return product


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def same_threads() -> None:
    """Let this thread's loops be spread over as many threads as torch's are."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _run(loop: Any, *given: Any) -> None:
    same_threads()
    loop(*(_array(each) if isinstance(each, Tensor) else each for each in given))


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
