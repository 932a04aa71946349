"""Kernels compiled by Numba: products of few rows of 24-bit activations with packed rows, as exact as float32 allows.

Codes are counted from the one that stands for 0, and the bias raised by as much: else the sum of the products and the
bias times the sum of x would be large wherever x has an offset, and nearly cancel. The sums stay integers until that is
done. Lanes go into float64 every few thousand columns, so that the error doesn't grow with the length of the rows.
"""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.activations import step_codes
from quantcore_backends.cpu_kernels.ahead import prefetch_lines, rows_ahead
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, floats_at, job_at
from quantcore_backends.cpu_kernels.kernels_int import four, further, rows_of, scales_of
from quantcore_backends.cpu_kernels.simd import fma, load, splat, store, times, total, zero
from quantcore_backends.cpu_kernels.simd_int import chunk_codes, dot, spread, spread_first, to_floats
from quantcore_backends.cpu_kernels.simd_int24 import (
    minus_products,
    spread_integers,
    store_integers,
    to_integers,
    zero_codes,
)
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["four_rows"]

_WIDTH: Final = 24
_FLUSH: Final = 4096
"""Columns after which lanes go into float64."""


@njit(forceinline=True, **COMPILED)
def _lay_row(scales, biases, left, to, laid, top, kind):
    """Lay a vector of a row's scales, `left` of them, beside its codes of 0 and its biases, raised by as much."""
    s, b = spread_first((scales, biases), kind, LANES, left)
    origin = zero_codes(s, b, splat(top))
    store(to, s)
    store(to + laid, fma(origin, s, b))
    store_integers(to + 2 * laid, to_integers(origin))


@njit(**COMPILED)
def _lay(scales, beside, groups, to, laid, top, kind, step):
    """Lay four rows' scales of a kind, its raised biases, and its codes of 0."""
    for g in range(0, groups, LANES):
        s, left = further(scales, g * step), groups - g
        b = further(s, beside)
        _lay_row(s[0], b[0], left, to + g * 4, laid, top, kind)
        _lay_row(s[1], b[1], left, to + g * 4 + 3 * laid, laid, top, kind)
        _lay_row(s[2], b[2], left, to + g * 4 + 6 * laid, laid, top, kind)
        _lay_row(s[3], b[3], left, to + g * 4 + 9 * laid, laid, top, kind)


@cache
def four_rows(bits: int, run: int, scales: int) -> Any:
    """Kernel over rows of the weight, four at a time, which share the loads of x.

    x has a scale for each `run` of elements; the weight has `scales` of them in a step, or one for several steps.
    """
    step = step_codes(bits, run)
    chunks, top = step // chunk_codes(bits), np.float32((1 << bits) - 1)
    step_runs = step // run
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
        beside, ahead = job.biases - job.scales, rows_ahead(job)
        for n in range(first, last, 4):
            numbers = four(n, last)
            p0, p1, p2, p3 = rows_of(job, numbers)
            beginnings = scales_of(job, numbers)
            _lay(beginnings, beside, job.groups, s0, laid, top, job.kind, job.scale_step)
            for m in range(job.rows):
                x, xs = job.codes + m * job.codes_row, job.code_scales + m * job.code_scales_row
                sums = job.sums + m * job.sums_row
                near = n + ahead if m == 0 else n
                near_codes, near_scales = job.packed + near * job.packed_row, job.scales + near * job.scale_row
                d0 = d1 = d2 = d3 = 0.0
                for start in range(0, steps, flush):
                    t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                    for i in range(start, min(start + flush, steps)):
                        xi, pi, g = x + i * codes_step, i * packed_step, (i * scales >> job.group_shift) * 4
                        xv = spread(xs + i * (step_runs * 4), step_runs)
                        xi_sum = spread_integers(sums + i * VECTOR_BYTES, LANES)
                        prefetch_lines(near_codes + 4 * pi, 4 * packed_step)
                        prefetch_lines(near_scales + g * job.scale_step, 1)
                        prefetch_lines(near_scales + beside + g * job.scale_step, 1)
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
                        t0, t1 = fma(a0, spread(s0 + g, scales), t0), fma(a1, spread(s1 + g, scales), t1)
                        t2, t3 = fma(a2, spread(s2 + g, scales), t2), fma(a3, spread(s3 + g, scales), t3)
                    d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                # The raised biases are small: they have their own lanes, lest they be lost beside the products.
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for g in range(0, job.groups * 4, VECTOR_BYTES):
                    xsum = load(sums + steps * VECTOR_BYTES + g)
                    t0, t1 = fma(load(r0 + g), xsum, t0), fma(load(r1 + g), xsum, t1)
                    t2, t3 = fma(load(r2 + g), xsum, t2), fma(load(r3 + g), xsum, t3)
                d0, d1, d2, d3 = d0 + total(t0), d1 + total(t1), d2 + total(t2), d3 + total(t3)
                out = floats_at(job.out + m * job.out_row, job.out_features)
                _, n1, n2, n3 = numbers
                out[n], out[n1], out[n2], out[n3] = d0, d1, d2, d3
                if (out[n] - out[n]) + (out[n1] - out[n1]) + (out[n2] - out[n2]) + (out[n3] - out[n3]) != 0:
                    job.refused = 1  # not finite: floats must answer

    return kernel
