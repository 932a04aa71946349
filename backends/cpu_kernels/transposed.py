"""The product along the rows of a packed weight, ``x @ w`` where groups lie along w's columns, compiled by Numba.

Each vector of codes is unpacked once and added, scaled, to the sums of every row of x. The scale is multiplied into x,
codes are counted from the one that stands for 0, and the rest enters as ``sum(x * bias)`` in float64, as in the kernels
for the other way round. Sums are kept over `_BLOCK` rows of the weight at a time, so that the error doesn't grow with
their number.
"""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import CACHED, njit
from quantcore_backends.cpu_kernels.kernels import code_at, rest, zero_code
from quantcore_backends.cpu_kernels.simd import LANES, codes, float_at, fma, load, minus, scale_at, splat, store

__all__ = ["rows_by_few"]

_BLOCK: Final = 256
_AT_ONCE: Final = 4


@cache
def rows_by_few(bits: int, kind: int) -> Any:
    """Kernel for few rows of x: the columns of the product in the spans from `first` to `last`.

    x has `count` rows of `rows` float32 each, the length of the contraction, and `x_row` bytes from row to row; rows of
    the weight from `safe` on are read at `tail`, as if all of it were there. `out` is a float32 matrix of `count` rows
    and `columns` columns; `narrow` and `wide` are memory for count · (spans · span + 4) float32
    and count · spans float64, where spans are last − first.
    """

    @njit(**CACHED)
    def kernel(
        x,
        x_row,
        count,
        packed,
        tail,
        safe,
        scales,
        biases,
        out,
        narrow,
        wide,
        first,
        last,
        rows,
        columns,
        span,
        row,
        scale_row,
        step,
    ):
        start = first * span
        width = min(last * span, columns) - start
        sums, coefficients = narrow.ctypes.data, narrow.ctypes.data + 4 * count * width
        wide[: count * (last - first)] = 0
        out[:, start : start + width] = 0
        for block in range(0, rows, _BLOCK):
            narrow[: count * width] = 0
            end = min(block + _BLOCK, rows)
            for n in range(block, end, _AT_ONCE):
                n1, n2, n3 = min(n + 1, end - 1), min(n + 2, end - 1), min(n + 3, end - 1)
                for g in range(first, last):
                    at = g * step
                    s0, b0 = scale_at(scales + n * scale_row + at, kind), scale_at(biases + n * scale_row + at, kind)
                    s1, b1 = scale_at(scales + n1 * scale_row + at, kind), scale_at(biases + n1 * scale_row + at, kind)
                    s2, b2 = scale_at(scales + n2 * scale_row + at, kind), scale_at(biases + n2 * scale_row + at, kind)
                    s3, b3 = scale_at(scales + n3 * scale_row + at, kind), scale_at(biases + n3 * scale_row + at, kind)
                    o0, o1 = zero_code(s0, b0, bits), zero_code(s1, b1, bits)
                    o2, o3 = zero_code(s2, b2, bits), zero_code(s3, b3, bits)
                    r0, r1, r2, r3 = rest(s0, b0, o0), rest(s1, b1, o1), rest(s2, b2, o2), rest(s3, b3, o3)
                    for m in range(count):
                        xm = x + m * x_row
                        x0, x1, x2, x3 = float_at(xm + 4 * n), np.float32(0), np.float32(0), np.float32(0)
                        total = r0 * x0
                        c1 = c2 = c3 = np.float32(0)
                        if n + 1 < end:
                            x1 = float_at(xm + 4 * n1)
                            c1, total = x1 * s1, total + r1 * x1
                        if n + 2 < end:
                            x2 = float_at(xm + 4 * n2)
                            c2, total = x2 * s2, total + r2 * x2
                        if n + 3 < end:
                            x3 = float_at(xm + 4 * n3)
                            c3, total = x3 * s3, total + r3 * x3
                        wide[m * (last - first) + g - first] += total
                        base = count * width + 4 * m
                        narrow[base], narrow[base + 1] = x0 * s0, c1
                        narrow[base + 2], narrow[base + 3] = c2, c3
                    z0, z1, z2, z3 = splat(o0), splat(o1), splat(o2), splat(o3)
                    length = min(span, columns - g * span)
                    at = g * span * bits // 8
                    p0 = (packed if n < safe else tail) + at + n * row
                    p1 = (packed if n1 < safe else tail) + at + n1 * row
                    p2 = (packed if n2 < safe else tail) + at + n2 * row
                    p3 = (packed if n3 < safe else tail) + at + n3 * row
                    to = sums + 4 * (g - first) * span
                    whole = length // LANES
                    for v in range(whole):
                        here = v * (LANES * bits // 8)
                        w0, w1 = minus(codes(p0 + here, bits), z0), minus(codes(p1 + here, bits), z1)
                        w2, w3 = minus(codes(p2 + here, bits), z2), minus(codes(p3 + here, bits), z3)
                        for m in range(count):
                            place, c = to + 4 * (m * width + v * LANES), coefficients + 16 * m
                            sum0 = fma(w0, splat(float_at(c)), load(place))
                            sum1 = fma(w1, splat(float_at(c + 4)), sum0)
                            sum2 = fma(w2, splat(float_at(c + 8)), sum1)
                            store(place, fma(w3, splat(float_at(c + 12)), sum2))
                    for k in range(whole * LANES, length):
                        k0, k1 = np.float32(code_at(p0, k, bits)) - o0, np.float32(code_at(p1, k, bits)) - o1
                        k2, k3 = np.float32(code_at(p2, k, bits)) - o2, np.float32(code_at(p3, k, bits)) - o3
                        for m in range(count):
                            c = coefficients + 16 * m
                            added = np.float64(k0) * float_at(c) + np.float64(k1) * float_at(c + 4)
                            added += np.float64(k2) * float_at(c + 8) + np.float64(k3) * float_at(c + 12)
                            narrow[m * width + (g - first) * span + k] += np.float32(added)
            for m in range(count):
                for k in range(width):
                    out[m, start + k] += narrow[m * width + k]
        for m in range(count):
            for g in range(first, last):
                for k in range((g - first) * span, min((g + 1 - first) * span, width)):
                    out[m, start + k] += np.float32(wide[m * (last - first) + g - first])

    return kernel
