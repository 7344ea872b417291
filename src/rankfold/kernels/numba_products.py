"""The loop of a product with few rows, compiled by Numba: each pair of weight rows meets four rows at a time,
so that what is loaded is used eight times."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from rankfold.kernels.numba_loops import MATHS, loop, wide

ROWS, PAIR = 4, 2
zero = np.float32(0)


@njit(fastmath=MATHS, error_model="numpy", inline="always")
def _four(x, m, u, v, out, n):
    """Products of rows m to m + 3 of x with u and v."""
    a = b = c = d = e = f = g = h = zero
    x0, x1, x2, x3 = x[m], x[m + 1], x[m + 2], x[m + 3]
    for k in range(len(u)):
        p, q = wide(u[k]), wide(v[k])
        a += p * x0[k]
        b += p * x1[k]
        c += p * x2[k]
        d += p * x3[k]
        e += q * x0[k]
        f += q * x1[k]
        g += q * x2[k]
        h += q * x3[k]
    out[m, n], out[m + 1, n], out[m + 2, n], out[m + 3, n] = a, b, c, d
    out[m, n + 1], out[m + 1, n + 1], out[m + 2, n + 1], out[m + 3, n + 1] = e, f, g, h


@njit(fastmath=MATHS, error_model="numpy", inline="always")
def _one(x, m, u, out, n):
    a, row = zero, x[m]
    for k in range(len(u)):
        a += wide(u[k]) * row[k]
    out[m, n] = a


@loop
def few_rows(x, weight, out):
    """``x weight^T``: x (rows, columns), weight (features, columns), perhaps bfloat16's bits -> out (rows,
    features)."""
    rows, features = out.shape
    fours = rows - rows % ROWS
    for pair in prange(features // PAIR):
        n = PAIR * pair
        for m in range(0, fours, ROWS):
            _four(x, m, weight[n], weight[n + 1], out, n)
        for m in range(fours, rows):
            _one(x, m, weight[n], out, n)
            _one(x, m, weight[n + 1], out, n + 1)
    if features % PAIR:
        for m in range(rows):
            _one(x, m, weight[features - 1], out, features - 1)
