"""Kernels compiled by Numba for the microscaled modes: products of few rows of x, and packed rows made dense.

Elements are decoded in registers and multiplied as float32; each group's partial product is scaled once. Partial sums
go into float64 every `flush` groups, so that the error doesn't grow with the length of the rows.

Operands are given as addresses and byte strides, `out` as an array whose rows are those of the weight from `first` to
`last`; `table` has the float32 value of each byte of `scales`. Blocks of four that don't fit are filled by repeating
the last row.
"""

from functools import cache
from typing import Any

from quantcore_backends.cpu_kernels.disk_cache import CACHED, njit
from quantcore_backends.cpu_kernels.kernels import code_at
from quantcore_backends.cpu_kernels.simd import LANES, byte_at, float_at, fma, load, splat, store, times, total, zero
from quantcore_backends.cpu_kernels.simd_microscaled import elements

__all__ = ["dense_rows", "four_by_one", "one_by_four"]


@njit(**CACHED)
def scale_of(address, table):
    """The scale whose code is at an address."""
    return float_at(table + 4 * byte_at(address))


@cache
def four_by_one(bits: int) -> Any:
    """Kernel for one row of x: four rows of the weight share its loads."""

    @njit(**CACHED)
    def kernel(x, packed, scales, table, values, out, first, last, columns, group, flush, row, scale_row):
        groups = (columns + group - 1) // group
        for n in range(first, last, 4):
            n1, n2, n3 = min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)
            d0 = d1 = d2 = d3 = 0.0
            t0, t1, t2, t3 = zero(), zero(), zero(), zero()
            for g in range(groups):
                s0, s1 = scale_of(scales + n * scale_row + g, table), scale_of(scales + n1 * scale_row + g, table)
                s2, s3 = scale_of(scales + n2 * scale_row + g, table), scale_of(scales + n3 * scale_row + g, table)
                start = g * group
                length = min(group, columns - start)
                at = packed + start * bits // 8
                p0, p1, p2, p3 = at + n * row, at + n1 * row, at + n2 * row, at + n3 * row
                xs = x + start * 4
                a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                whole = length // LANES
                for v in range(whole):
                    xv = load(xs + v * (LANES * 4))
                    here = v * (LANES * bits // 8)
                    a0, a1 = fma(elements(p0 + here, bits), xv, a0), fma(elements(p1 + here, bits), xv, a1)
                    a2, a3 = fma(elements(p2 + here, bits), xv, a2), fma(elements(p3 + here, bits), xv, a3)
                t0, t1 = fma(a0, splat(s0), t0), fma(a1, splat(s1), t1)
                t2, t3 = fma(a2, splat(s2), t2), fma(a3, splat(s3), t3)
                for k in range(whole * LANES, length):
                    xk = float(float_at(xs + k * 4))
                    d0 += s0 * values[code_at(p0, k, bits)] * xk
                    d1 += s1 * values[code_at(p1, k, bits)] * xk
                    d2 += s2 * values[code_at(p2, k, bits)] * xk
                    d3 += s3 * values[code_at(p3, k, bits)] * xk
                if g % flush == flush - 1:
                    d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                    t0, t1, t2, t3 = zero(), zero(), zero(), zero()
            out[n - first, 0], out[n1 - first, 0] = d0 + total(t0), d1 + total(t1)
            out[n2 - first, 0], out[n3 - first, 0] = d2 + total(t2), d3 + total(t3)

    return kernel


@cache
def one_by_four(bits: int) -> Any:
    """Kernel for several rows of x, four at a time: they share the decoding of a row of the weight."""

    @njit(**CACHED)
    def kernel(x, packed, scales, table, values, out, first, last, columns, group, flush, row, scale_row):
        groups = (columns + group - 1) // group
        rows = out.shape[1]
        for m in range(0, rows, 4):
            m1, m2, m3 = min(m + 1, rows - 1), min(m + 2, rows - 1), min(m + 3, rows - 1)
            for n in range(first, last):
                d0 = d1 = d2 = d3 = 0.0
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for g in range(groups):
                    s = scale_of(scales + n * scale_row + g, table)
                    sv = splat(s)
                    start = g * group
                    length = min(group, columns - start)
                    p = packed + n * row + start * bits // 8
                    x0, x1 = x + (m * columns + start) * 4, x + (m1 * columns + start) * 4
                    x2, x3 = x + (m2 * columns + start) * 4, x + (m3 * columns + start) * 4
                    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
                    whole = length // LANES
                    for v in range(whole):
                        at = v * (LANES * 4)
                        w = elements(p + v * (LANES * bits // 8), bits)
                        a0, a1 = fma(w, load(x0 + at), a0), fma(w, load(x1 + at), a1)
                        a2, a3 = fma(w, load(x2 + at), a2), fma(w, load(x3 + at), a3)
                    t0, t1, t2, t3 = fma(a0, sv, t0), fma(a1, sv, t1), fma(a2, sv, t2), fma(a3, sv, t3)
                    for k in range(whole * LANES, length):
                        w1 = s * values[code_at(p, k, bits)]
                        d0 += w1 * float(float_at(x0 + k * 4))
                        d1 += w1 * float(float_at(x1 + k * 4))
                        d2 += w1 * float(float_at(x2 + k * 4))
                        d3 += w1 * float(float_at(x3 + k * 4))
                    if g % flush == flush - 1:
                        d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                        t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                out[n - first, m], out[n - first, m1] = d0 + total(t0), d1 + total(t1)
                out[n - first, m2], out[n - first, m3] = d2 + total(t2), d3 + total(t3)

    return kernel


@cache
def dense_rows(bits: int) -> Any:
    """Kernel that makes rows dense: ``element * scale`` in float32."""

    @njit(**CACHED)
    def kernel(packed, scales, table, values, out, first, last, columns, group, row, scale_row):
        groups = (columns + group - 1) // group
        base = out.ctypes.data
        for n in range(first, last):
            for g in range(groups):
                start = g * group
                length = min(group, columns - start)
                p = packed + n * row + start * bits // 8
                s = scale_of(scales + n * scale_row + g, table)
                sv = splat(s)
                to = base + ((n - first) * columns + start) * 4
                whole = length // LANES
                for v in range(whole):
                    store(to + v * (LANES * 4), times(elements(p + v * (LANES * bits // 8), bits), sv))
                for k in range(whole * LANES, length):
                    out[n - first, start + k] = values[code_at(p, k, bits)] * s

    return kernel
