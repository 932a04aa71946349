"""Kernels compiled by Numba: products of few rows of x with packed rows, and packed rows made dense.

Codes are unpacked in registers and multiplied as float32; each group's partial product is scaled once, and the biases
enter as ``bias * sum(x)`` over the group. Codes are counted from the one that stands for 0, and the bias raised by as
much: the two terms would else be large and nearly cancel wherever x has an offset. Partial sums go into float64 every
few thousand columns, so that the error doesn't grow with the length of the rows.

Operands are given as addresses and byte strides, `out` as an array whose rows are those of the weight from `first` to
`last`. `span` is the number of columns that share a scale: the group size, or a slice of the row where the row is one
group (then `scale_step` is 0). Blocks of four that don't fit are filled by repeating the last row.
"""

from functools import cache
from typing import Any

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import CACHED, njit
from quantcore_backends.cpu_kernels.simd import (
    LANES,
    byte_at,
    codes,
    float_at,
    fma,
    load,
    minus,
    scale_at,
    scaled,
    splat,
    store,
    total,
    zero,
)

__all__ = ["dense_rows", "four_by_one", "one_by_four", "span_sums"]


@njit(**CACHED)
def code_at(address, index, bits):
    """One code of a bitstream."""
    bit = index * bits
    value = byte_at(address + (bit >> 3)) >> (bit & 7)
    if (bit & 7) + bits > 8:
        value |= byte_at(address + (bit >> 3) + 1) << (8 - (bit & 7))
    return value & ((1 << bits) - 1)


@njit(**CACHED)
def span_sums(x, rows, columns, span, sums):
    """Sum of each row of x over each span, accumulated in float64."""
    spans = sums.shape[1]
    for m in range(rows):
        for g in range(spans):
            value = 0.0
            for k in range(g * span, min((g + 1) * span, columns)):
                value += x[m, k]
            sums[m, g] = value


@njit(**CACHED)
def zero_code(scale, bias, bits):
    """The code that stands nearest to 0, from which codes are counted."""
    nearest = np.rint(-bias / scale)
    top = np.float32((1 << bits) - 1)
    return min(nearest, top) if nearest > 0 else np.float32(0)  # 0 for NaN as well


@njit(**CACHED)
def rest(scale, bias, origin):
    """What an element of x contributes beside its code, in float64: the bias, raised by the codes' origin."""
    return np.float64(bias) + np.float64(origin) * np.float64(scale)


@cache
def four_by_one(bits: int, kind: int) -> Any:
    """Kernel for one row of x: four rows of the weight share its loads."""

    @njit(**CACHED)
    def kernel(x, sums, packed, scales, biases, out, first, last, columns, span, flush, row, scale_row, scale_step):
        spans = (columns + span - 1) // span
        for n in range(first, last, 4):
            n1, n2, n3 = min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)
            d0 = d1 = d2 = d3 = 0.0
            t0, t1, t2, t3 = zero(), zero(), zero(), zero()
            for g in range(spans):
                step = g * scale_step
                s0, b0 = scale_at(scales + n * scale_row + step, kind), scale_at(biases + n * scale_row + step, kind)
                s1, b1 = scale_at(scales + n1 * scale_row + step, kind), scale_at(biases + n1 * scale_row + step, kind)
                s2, b2 = scale_at(scales + n2 * scale_row + step, kind), scale_at(biases + n2 * scale_row + step, kind)
                s3, b3 = scale_at(scales + n3 * scale_row + step, kind), scale_at(biases + n3 * scale_row + step, kind)
                o0, o1 = zero_code(s0, b0, bits), zero_code(s1, b1, bits)
                o2, o3 = zero_code(s2, b2, bits), zero_code(s3, b3, bits)
                z0, z1, z2, z3 = splat(o0), splat(o1), splat(o2), splat(o3)
                start = g * span
                length = min(span, columns - start)
                at = packed + start * bits // 8
                p0, p1, p2, p3 = at + n * row, at + n1 * row, at + n2 * row, at + n3 * row
                xs = x + start * 4
                a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                whole = length // LANES
                for v in range(whole):
                    xv = load(xs + v * (LANES * 4))
                    here = v * (LANES * bits // 8)
                    a0 = fma(minus(codes(p0 + here, bits), z0), xv, a0)
                    a1 = fma(minus(codes(p1 + here, bits), z1), xv, a1)
                    a2 = fma(minus(codes(p2 + here, bits), z2), xv, a2)
                    a3 = fma(minus(codes(p3 + here, bits), z3), xv, a3)
                t0, t1 = fma(a0, splat(s0), t0), fma(a1, splat(s1), t1)
                t2, t3 = fma(a2, splat(s2), t2), fma(a3, splat(s3), t3)
                for k in range(whole * LANES, length):
                    xk = np.float64(float_at(xs + k * 4))
                    d0 += s0 * (code_at(p0, k, bits) - o0) * xk
                    d1 += s1 * (code_at(p1, k, bits) - o1) * xk
                    d2 += s2 * (code_at(p2, k, bits) - o2) * xk
                    d3 += s3 * (code_at(p3, k, bits) - o3) * xk
                xg = sums[0, g]
                d0, d1 = d0 + rest(s0, b0, o0) * xg, d1 + rest(s1, b1, o1) * xg
                d2, d3 = d2 + rest(s2, b2, o2) * xg, d3 + rest(s3, b3, o3) * xg
                if g % flush == flush - 1:
                    d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                    t0, t1, t2, t3 = zero(), zero(), zero(), zero()
            out[n - first, 0], out[n1 - first, 0] = d0 + total(t0), d1 + total(t1)
            out[n2 - first, 0], out[n3 - first, 0] = d2 + total(t2), d3 + total(t3)

    return kernel


@cache
def one_by_four(bits: int, kind: int) -> Any:
    """Kernel for several rows of x, four at a time: they share the unpacking of a row of the weight."""

    @njit(**CACHED)
    def kernel(x, sums, packed, scales, biases, out, first, last, columns, span, flush, row, scale_row, scale_step):
        spans = (columns + span - 1) // span
        rows = out.shape[1]
        for m in range(0, rows, 4):
            m1, m2, m3 = min(m + 1, rows - 1), min(m + 2, rows - 1), min(m + 3, rows - 1)
            for n in range(first, last):
                d0 = d1 = d2 = d3 = 0.0
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for g in range(spans):
                    step = n * scale_row + g * scale_step
                    s, b = scale_at(scales + step, kind), scale_at(biases + step, kind)
                    origin = zero_code(s, b, bits)
                    sv, z = splat(s), splat(origin)
                    start = g * span
                    length = min(span, columns - start)
                    p = packed + n * row + start * bits // 8
                    x0, x1 = x + (m * columns + start) * 4, x + (m1 * columns + start) * 4
                    x2, x3 = x + (m2 * columns + start) * 4, x + (m3 * columns + start) * 4
                    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                    whole = length // LANES
                    for v in range(whole):
                        at = v * (LANES * 4)
                        w = minus(codes(p + v * (LANES * bits // 8), bits), z)
                        a0, a1 = fma(w, load(x0 + at), a0), fma(w, load(x1 + at), a1)
                        a2, a3 = fma(w, load(x2 + at), a2), fma(w, load(x3 + at), a3)
                    t0, t1, t2, t3 = fma(a0, sv, t0), fma(a1, sv, t1), fma(a2, sv, t2), fma(a3, sv, t3)
                    for k in range(whole * LANES, length):
                        w1 = np.float64(s) * (code_at(p, k, bits) - origin)
                        d0 += w1 * float_at(x0 + k * 4)
                        d1 += w1 * float_at(x1 + k * 4)
                        d2 += w1 * float_at(x2 + k * 4)
                        d3 += w1 * float_at(x3 + k * 4)
                    r = rest(s, b, origin)
                    d0, d1 = d0 + r * sums[m, g], d1 + r * sums[m1, g]
                    d2, d3 = d2 + r * sums[m2, g], d3 + r * sums[m3, g]
                    if g % flush == flush - 1:
                        d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                        t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                out[n - first, m], out[n - first, m1] = d0 + total(t0), d1 + total(t1)
                out[n - first, m2], out[n - first, m3] = d2 + total(t2), d3 + total(t3)

    return kernel


@cache
def dense_rows(bits: int, kind: int) -> Any:
    """Kernel that makes rows dense: ``code * scale + bias`` in float32, two roundings."""

    @njit(**CACHED)
    def kernel(packed, scales, biases, out, first, last, columns, span, row, scale_row, scale_step):
        spans = (columns + span - 1) // span
        base = out.ctypes.data
        for n in range(first, last):
            for g in range(spans):
                start = g * span
                length = min(span, columns - start)
                p = packed + n * row + start * bits // 8
                s = scale_at(scales + n * scale_row + g * scale_step, kind)
                b = scale_at(biases + n * scale_row + g * scale_step, kind)
                sv, bv = splat(s), splat(b)
                to = base + ((n - first) * columns + start) * 4
                whole = length // LANES
                for v in range(whole):
                    store(to + v * (LANES * 4), scaled(codes(p + v * (LANES * bits // 8), bits), sv, bv))
                for k in range(whole * LANES, length):
                    product = np.float32(s * np.float32(code_at(p, k, bits)))
                    out[n - first, start + k] = product + b

    return kernel
