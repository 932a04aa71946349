"""Kernels compiled by Numba: products of few rows of 24-bit activations with packed rows, as exact as float32 allows.

Codes are counted from the one that stands for 0, and the bias raised by as much: else the sum of the products and the
bias times the sum of x would be large wherever x has an offset, and nearly cancel. The sums stay integers until that is
done. Lanes go into float64 every few thousand columns, so that the error doesn't grow with the length of the rows.
"""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.activations import step_codes
from quantcore_backends.cpu_kernels.disk_cache import cfunc, njit
from quantcore_backends.cpu_kernels.job import COMPILED, KERNEL, floats_at, job_at, row_of
from quantcore_backends.cpu_kernels.kernels_int import LINE, prefetch_rows, rows_ahead
from quantcore_backends.cpu_kernels.simd import fma, load, splat, store, times, total, zero
from quantcore_backends.cpu_kernels.simd_int import chunk_codes, dot, spread, spread_first, to_floats
from quantcore_backends.cpu_kernels.simd_int24 import (
    minus_products,
    spread_integers,
    store_integers,
    to_integers,
    zero_codes,
)
from quantcore_backends.cpu_kernels.vectors import LANES

__all__ = ["four_rows"]

_WIDTH: Final = 24
_FLUSH: Final = 4096
"""Columns after which lanes go into float64."""
_VECTOR: Final = 4 * LANES


def _laying(kind: int) -> Any:
    """Function that lays a row's scales of a kind beside its codes of 0 and its biases, raised by as much."""
    size = (4, 2, 2)[kind]

    @njit(**COMPILED)
    def lay(scales, biases, groups, to, laid, top):
        for g in range(0, groups, LANES):
            left = groups - g
            if left >= LANES:
                s, b = spread(scales + g * size, kind, LANES), spread(biases + g * size, kind, LANES)
            else:
                s = spread_first(scales + g * size, kind, LANES, left)
                b = spread_first(biases + g * size, kind, LANES, left)
            origin = zero_codes(s, b, splat(top))
            store(to + g * 4, s)
            store(to + laid + g * 4, fma(origin, s, b))
            store_integers(to + 2 * laid + g * 4, to_integers(origin))

    return lay


# A kernel that is cached on disk may close over numbers only: of functions, Numba sees no two that are the same.
_lay_float32, _lay_float16, _lay_bfloat16 = _laying(0), _laying(1), _laying(2)


@njit(**COMPILED)
def lay_row(job, n, to, laid, top):
    """Lay a row's scales, its raised biases, and its codes of 0."""
    scales, biases = job.scales + n * job.scale_row, job.biases + n * job.scale_row
    if job.kind == 0:
        _lay_float32(scales, biases, job.groups, to, laid, top)
    elif job.kind == 1:
        _lay_float16(scales, biases, job.groups, to, laid, top)
    else:
        _lay_bfloat16(scales, biases, job.groups, to, laid, top)


@cache
def four_rows(bits: int, run: int, scales: int) -> Any:
    """Kernel over rows of the weight, four at a time, which share the loads of x.

    x has a scale for each `run` of elements; the weight has `scales` of them in a step, or one for several steps.
    """
    step = step_codes(bits, run)
    chunks, top = step // chunk_codes(bits), np.float32((1 << bits) - 1)
    packed_step, codes_step, flush = step * bits // 8, step * _WIDTH // 8, max(1, _FLUSH // step)

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        steps = (job.in_features + step - 1) // step
        laid = job.scratch_size // 12  # of each of four rows, scales, raised biases and codes of 0
        s0 = job.scratch + thread * job.scratch_size
        s1, s2, s3 = s0 + 3 * laid, s0 + 6 * laid, s0 + 9 * laid
        r0, r1, r2, r3 = s0 + laid, s1 + laid, s2 + laid, s3 + laid
        z0, z1, z2, z3 = r0 + laid, r1 + laid, r2 + laid, r3 + laid
        ahead = rows_ahead(job)
        for n in range(first, last, 4):
            n1, n2, n3 = min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)
            p0, p1, p2, p3 = row_of(job, n), row_of(job, n1), row_of(job, n2), row_of(job, n3)
            lay_row(job, n, s0, laid, top)
            lay_row(job, n1, s1, laid, top)
            lay_row(job, n2, s2, laid, top)
            lay_row(job, n3, s3, laid, top)
            for m in range(job.rows):
                x, xs = job.codes + m * job.codes_row, job.code_scales + m * job.code_scales_row
                sums = job.sums + m * job.sums_row
                d0 = d1 = d2 = d3 = 0.0
                for start in range(0, steps, flush):
                    t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                    for i in range(start, min(start + flush, steps)):
                        xi, pi, g = x + i * codes_step, i * packed_step, (i * scales >> job.group_shift) * 4
                        xv, xi_sum = load(xs + i * _VECTOR), spread_integers(sums + i * _VECTOR, LANES)
                        if m == 0 and pi % LINE < packed_step:
                            prefetch_rows(job, n + ahead, pi, g // 4 * job.scale_step)
                        c0 = dot(p0 + pi, xi, bits, _WIDTH, chunks)
                        c1 = dot(p1 + pi, xi, bits, _WIDTH, chunks)
                        c2 = dot(p2 + pi, xi, bits, _WIDTH, chunks)
                        c3 = dot(p3 + pi, xi, bits, _WIDTH, chunks)
                        c0 = minus_products(c0, xi_sum, spread_integers(z0 + g, scales))
                        c1 = minus_products(c1, xi_sum, spread_integers(z1 + g, scales))
                        c2 = minus_products(c2, xi_sum, spread_integers(z2 + g, scales))
                        c3 = minus_products(c3, xi_sum, spread_integers(z3 + g, scales))
                        a0, a1 = times(to_floats(c0), xv), times(to_floats(c1), xv)
                        a2, a3 = times(to_floats(c2), xv), times(to_floats(c3), xv)
                        t0, t1 = fma(a0, spread(s0 + g, 0, scales), t0), fma(a1, spread(s1 + g, 0, scales), t1)
                        t2, t3 = fma(a2, spread(s2 + g, 0, scales), t2), fma(a3, spread(s3 + g, 0, scales), t3)
                    d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                # The raised biases are small: they have their own lanes, lest they be lost beside the products.
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for g in range(0, job.groups * 4, _VECTOR):
                    xsum = load(sums + steps * _VECTOR + g)
                    t0, t1 = fma(load(r0 + g), xsum, t0), fma(load(r1 + g), xsum, t1)
                    t2, t3 = fma(load(r2 + g), xsum, t2), fma(load(r3 + g), xsum, t3)
                d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                out = floats_at(job.out + m * job.out_row, job.out_features)
                y0, y1, y2, y3 = np.float32(d0), np.float32(d1), np.float32(d2), np.float32(d3)
                out[n], out[n1], out[n2], out[n3] = y0, y1, y2, y3
                if y0 - y0 + y1 - y1 + y2 - y2 + y3 - y3 != 0:
                    job.refused = 1  # not finite: floats must answer

    return kernel
