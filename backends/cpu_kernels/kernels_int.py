"""Kernels compiled by Numba: products of few rows of integer activations with packed rows.

The products of a run of codes are summed exactly, as integers; the sum is scaled by x's scale, then by the weight's.
The biases enter as ``bias * sum(x)`` over the group, the sum being that of the rounded x: that of the exact x would
leave the rounding error times the bias, which is most of the weight's range.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc

from quantcore_backends.cpu_kernels.activations import step_codes
from quantcore_backends.cpu_kernels.job import COMPILED, KERNEL, floats_at, job_at, row_of
from quantcore_backends.cpu_kernels.simd import fma, load, prefetch, scale_at, times, total, zero
from quantcore_backends.cpu_kernels.simd_int import (
    chunk_codes,
    dot,
    spread,
    spread_valid,
    to_floats,
)
from quantcore_backends.cpu_kernels.vectors import LANES

__all__ = ["four_rows"]


@cache
def four_rows(bits: int, kind: int, run: int, scales: int, width: int) -> Any:
    """Kernel over rows of the weight, four at a time, which share the loads of x.

    x has a scale for each `run` of elements; the weight has `scales` of them in a step, or one for several steps.
    """
    step = step_codes(bits, run)
    chunks = step // chunk_codes(bits)
    packed_step, codes_step = step * bits // 8, step * width // 8
    size = (4, 2, 2)[kind]

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        whole, left = job.in_features // step, job.in_features % step
        valid = (left + job.group - 1) // job.group
        at = (whole * scales >> job.group_shift) * job.scale_step
        ahead, apart = 4 * job.packed_row, job.biases - job.scales
        whole_groups = job.groups // LANES * LANES
        for n in range(first, last, 4):
            n1, n2, n3 = min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)
            p0, p1, p2, p3 = row_of(job, n), row_of(job, n1), row_of(job, n2), row_of(job, n3)
            s0, s1 = job.scales + n * job.scale_row, job.scales + n1 * job.scale_row
            s2, s3 = job.scales + n2 * job.scale_row, job.scales + n3 * job.scale_row
            for m in range(job.rows):
                x, xs = job.codes + m * job.codes_row, job.code_scales + m * job.code_scales_row
                t0, t1, t2, t3 = zero(), zero(), zero(), zero()
                for i in range(whole):
                    xi, pi, si = x + i * codes_step, i * packed_step, (i * scales >> job.group_shift) * job.scale_step
                    xv = load(xs + i * (LANES * 4))
                    if m == 0 and pi % 64 == 0:
                        # The next four rows: hardware that prefetches learns a row's stream when it is half over.
                        prefetch(p0 + ahead + pi)
                        prefetch(p1 + ahead + pi)
                        prefetch(p2 + ahead + pi)
                        prefetch(p3 + ahead + pi)
                    a0 = times(to_floats(dot(p0 + pi, xi, bits, width, chunks)), xv)
                    a1 = times(to_floats(dot(p1 + pi, xi, bits, width, chunks)), xv)
                    a2 = times(to_floats(dot(p2 + pi, xi, bits, width, chunks)), xv)
                    a3 = times(to_floats(dot(p3 + pi, xi, bits, width, chunks)), xv)
                    t0, t1 = fma(a0, spread(s0 + si, kind, scales), t0), fma(a1, spread(s1 + si, kind, scales), t1)
                    t2, t3 = fma(a2, spread(s2 + si, kind, scales), t2), fma(a3, spread(s3 + si, kind, scales), t3)
                if left:
                    xi, pi, xv = x + whole * codes_step, whole * packed_step, load(xs + whole * (LANES * 4))
                    a0 = times(to_floats(dot(p0 + pi, xi, bits, width, chunks)), xv)
                    a1 = times(to_floats(dot(p1 + pi, xi, bits, width, chunks)), xv)
                    a2 = times(to_floats(dot(p2 + pi, xi, bits, width, chunks)), xv)
                    a3 = times(to_floats(dot(p3 + pi, xi, bits, width, chunks)), xv)
                    t0 = fma(a0, spread_valid(s0 + at, kind, scales, valid), t0)
                    t1 = fma(a1, spread_valid(s1 + at, kind, scales, valid), t1)
                    t2 = fma(a2, spread_valid(s2 + at, kind, scales, valid), t2)
                    t3 = fma(a3, spread_valid(s3 + at, kind, scales, valid), t3)
                sums = job.sums + m * job.sums_row
                out = floats_at(job.out + m * job.out_row, job.out_features)
                b0, b1, b2, b3 = s0 + apart, s1 + apart, s2 + apart, s3 + apart
                r0, r1, r2, r3 = 0.0, 0.0, 0.0, 0.0
                v0, v1, v2, v3 = zero(), zero(), zero(), zero()
                for g in range(0, whole_groups, LANES):
                    its = load(sums + g * 4)
                    v0 = fma(spread(b0 + g * size, kind, LANES), its, v0)
                    v1 = fma(spread(b1 + g * size, kind, LANES), its, v1)
                    v2 = fma(spread(b2 + g * size, kind, LANES), its, v2)
                    v3 = fma(spread(b3 + g * size, kind, LANES), its, v3)
                for g in range(whole_groups, job.groups):
                    of_group = np.float64(scale_at(sums + g * 4, 0))
                    r0 += np.float64(scale_at(b0 + g * size, kind)) * of_group
                    r1 += np.float64(scale_at(b1 + g * size, kind)) * of_group
                    r2 += np.float64(scale_at(b2 + g * size, kind)) * of_group
                    r3 += np.float64(scale_at(b3 + g * size, kind)) * of_group
                y0, y1 = total(t0) + (r0 + total(v0)), total(t1) + (r1 + total(v1))
                y2, y3 = total(t2) + (r2 + total(v2)), total(t3) + (r3 + total(v3))
                out[n], out[n1], out[n2], out[n3] = y0, y1, y2, y3
                if y0 - y0 + y1 - y1 + y2 - y2 + y3 - y3 != 0:
                    job.refused = 1  # not finite: floats must answer

    return kernel
