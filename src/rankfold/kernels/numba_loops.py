"""The loops of the fused kernels, compiled by Numba: rows are spread over threads, numbers are float32.

Every array is C-contiguous, of float32 or of bfloat16, which Numba has no type for: it comes as its 16 bits.
Not-a-number and infinity pass through, so no flag lets the compiler assume that there are none; sums may be
made in any order."""

from __future__ import annotations

import numpy as np
from numba import float32, njit, prange, types, uint16, uint32
from numba.extending import intrinsic, overload

f4 = np.float32
MATHS = {"reassoc", "contract", "arcp", "nsz"}
HIGH_BITS, ROUNDING, ONE, NOT_A_NUMBER = 16, 0x7FFF, 1, 0x7FC0  # of bfloat16 in float32's bits
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504, 0.693359375, 2.12194440e-4
# exp(r) - 1 - r over r^2 for |r| <= ln(2) / 2: Moshier's Cephes, single/expf.c.
CEPHES = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
LOWEST, HIGHEST = -87.0, 88.0  # whose exponentials float32 holds
MANTISSA, BIAS = 23, 127
VECTORS = 32  # numbers that a compiled loop takes at a time


loop = njit(parallel=True, fastmath=MATHS, error_model="numpy")


@intrinsic
def _float_of(typing, bits):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(float32))

    return float32(uint32), code


@intrinsic
def _bits_of(typing, value):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(uint32))

    return uint32(float32), code


def wide(stored):
    """A stored number as float32."""


def narrow(value, like):
    """``value`` as the array ``like`` stores it: in bfloat16 rounded to nearest, ties to even."""


@overload(wide)
def _wide(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: _float_of(uint32(stored) << uint32(HIGH_BITS))
    return lambda stored: stored


@overload(narrow)
def _narrow(value, like):
    if isinstance(like.dtype, types.Integer):
        return lambda value, like: _rounded(value)
    return lambda value, like: value


@njit
def _rounded(value):
    bits = _bits_of(value)
    upper = (bits + uint32(ROUNDING) + ((bits >> uint32(HIGH_BITS)) & uint32(ONE))) >> uint32(HIGH_BITS)
    return uint16(upper) if not np.isnan(value) else uint16(NOT_A_NUMBER)


@njit(fastmath=MATHS, error_model="numpy")
def _exp(x):
    """To two units in the last place, as a polynomial, which a compiler turns into vectors by itself."""
    inside = min(max(x, f4(LOWEST)), f4(HIGHEST))
    power = np.floor(inside * f4(LOG2_E) + f4(0.5))
    r = inside - power * f4(LN2_HIGH) + power * f4(LN2_LOW)
    p = f4(CEPHES[0])
    for c in CEPHES[1:]:
        p = p * r + f4(c)
    scale = _float_of(uint32(np.int32(power) + np.int32(BIAS)) << uint32(MANTISSA))
    return (p * r * r + r + f4(1)) * scale if not np.isnan(x) else x


@njit(fastmath=MATHS | {"nnan"})
def _larger(a, b):
    """For a maximum by vectors.  It may miss what is no number, which the sum of exponentials then holds."""
    return a if a > b else b


@loop
def rms_norm(x, weight, eps, out, inverse):
    rows, width = x.shape
    for i in prange(rows):
        total = f4(0)
        for j in range(width):
            total += wide(x[i, j]) * wide(x[i, j])
        scale = f4(1) / np.sqrt(total / f4(width) + eps)
        inverse[i] = scale
        for j in range(width):
            normed = narrow(wide(x[i, j]) * scale, x)
            out[i, j] = narrow(wide(normed) * wide(weight[j]), out)


@loop
def rms_norm_gradient(grad, x, weight, inverse, out):
    rows, width = x.shape
    for i in prange(rows):
        total = f4(0)
        for j in range(width):
            total += wide(grad[i, j]) * wide(weight[j]) * wide(x[i, j])
        scale = inverse[i]
        share = total * scale * scale * scale / f4(width)
        for j in range(width):
            own = wide(grad[i, j]) * wide(weight[j]) * scale
            out[i, j] = narrow(own - wide(x[i, j]) * share, out)


@loop
def gated(gate, up, out):
    rows, width = gate.shape
    for i in prange(rows):
        for j in range(width):
            a = wide(gate[i, j])
            out[i, j] = narrow(a / (f4(1) + _exp(-a)) * wide(up[i, j]), out)


@loop
def gated_gradient(grad, gate, up, by_gate, by_up):
    rows, width = gate.shape
    for i in prange(rows):
        for j in range(width):
            a, g = wide(gate[i, j]), wide(grad[i, j])
            share = f4(1) / (f4(1) + _exp(-a))
            by_up[i, j] = narrow(g * a * share, by_up)
            slope = share * (f4(1) + a * (f4(1) - share))
            by_gate[i, j] = narrow(g * wide(up[i, j]) * slope, by_gate)


@loop
def rotated(x, cos, sin, out):
    """x (tokens, heads, width), cos and sin (tokens, width)."""
    tokens, heads, width = x.shape
    half = width // 2
    for t in prange(tokens):
        for h in range(heads):
            for j in range(half):
                first, second = wide(x[t, h, j]), wide(x[t, h, half + j])
                out[t, h, j] = narrow(first * wide(cos[t, j]) - second * wide(sin[t, j]), out)
                other = second * wide(cos[t, half + j]) + first * wide(sin[t, half + j])
                out[t, h, half + j] = narrow(other, out)


@loop
def losses(logits, targets, smooth, with_gradient, out):
    """Cross-entropy of each row in ``out``; ``logits`` become its gradient where that is wanted."""
    rows, width = logits.shape
    for i in prange(rows):
        top, total = f4(-np.inf), f4(0)
        for j in range(width):
            top = _larger(top, wide(logits[i, j]))
            total += wide(logits[i, j])
        chosen = (f4(1) - smooth) * wide(logits[i, targets[i]]) + smooth * total / f4(width)
        mass = f4(0)
        for j in range(width):
            mass += _exp(wide(logits[i, j]) - top)
        out[i] = np.log(mass) + top - chosen
        if with_gradient:
            share, less = f4(1) / mass, smooth / f4(width)
            wanted = _exp(wide(logits[i, targets[i]]) - top) * share - less - (f4(1) - smooth)
            for j in range(width):
                logits[i, j] = narrow(_exp(wide(logits[i, j]) - top) * share - less, logits)
            logits[i, targets[i]] = narrow(wanted, logits)


@loop
def causal_shares(scores, scale, out):
    batch, queries, keys = scores.shape
    for i in prange(batch * queries):
        b, q = i // queries, i % queries
        seen = keys - queries + q + 1
        whole = min((seen + VECTORS - 1) // VECTORS * VECTORS, keys)  # few are left for one by one
        for j in range(seen, whole):
            scores[b, q, j] = f4(-np.inf)
        top = f4(-np.inf)
        for j in range(whole):
            top = _larger(top, scores[b, q, j])
        mass = f4(0)
        for j in range(whole):
            scores[b, q, j] = _exp((scores[b, q, j] - top) * scale)
            mass += scores[b, q, j]
        share = f4(1) / mass
        for j in range(whole):
            out[b, q, j] = narrow(scores[b, q, j] * share, out)
        for j in range(seen, keys):
            out[b, q, j] = narrow(f4(0), out)


@loop
def causal_shares_gradient(grad, shares, scale):
    batch, queries, keys = shares.shape
    for i in prange(batch * queries):
        b, q = i // queries, i % queries
        seen = keys - queries + q + 1
        total = f4(0)
        for j in range(seen):
            total += wide(grad[b, q, j]) * wide(shares[b, q, j])
        for j in range(seen):
            grad[b, q, j] = narrow(wide(shares[b, q, j]) * (wide(grad[b, q, j]) - total) * scale, grad)
        for j in range(seen, keys):
            grad[b, q, j] = narrow(f4(0), grad)
