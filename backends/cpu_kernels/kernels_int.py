"""Kernels compiled by Numba: products of few rows of integer activations with packed rows.

The products of a run of codes are summed exactly, as integers; the sum is scaled by x's scale times the weight's, which
are multiplied before, a vector of them at a time. The biases enter as ``bias * sum(x)`` over the group, the sum being
that of the rounded x: that of the exact x would leave the rounding error times the bias, which is most of the weight's
range.
"""

from functools import cache
from typing import Any, Final

from numba import literally

from quantcore_backends.cpu_kernels.activations import RAISED, step_codes
from quantcore_backends.cpu_kernels.ahead import prefetch_lines, rows_ahead
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, job_at, row_of
from quantcore_backends.cpu_kernels.simd import (
    fma,
    load,
    minus,
    splat,
    store,
    store_four,
    times,
    total,
    totals,
    zero,
)
from quantcore_backends.cpu_kernels.simd_int import chunk_codes, dot, spread, spread_first, to_floats
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["four", "four_rows", "further", "rows_of", "scales_of"]

_LOWERED: Final = 1 / RAISED


@njit(forceinline=True, **COMPILED)
def four(n, last):
    """Numbers of four rows from `n` on, the one before `last` in place of those that don't exist."""
    return n, min(n + 1, last - 1), min(n + 2, last - 1), min(n + 3, last - 1)


@njit(forceinline=True, **COMPILED)
def rows_of(job, n):
    """Addresses of four packed rows, by their numbers."""
    return row_of(job, n[0]), row_of(job, n[1]), row_of(job, n[2]), row_of(job, n[3])


@njit(forceinline=True, **COMPILED)
def scales_of(job, n):
    """Addresses of four rows' scales, by their numbers."""
    scales, row = job.scales, job.scale_row
    return scales + n[0] * row, scales + n[1] * row, scales + n[2] * row, scales + n[3] * row


@njit(forceinline=True, **COMPILED)
def further(addresses, size):
    """Four addresses, `size` bytes further."""
    return addresses[0] + size, addresses[1] + size, addresses[2] + size, addresses[3] + size


@njit(forceinline=True, **COMPILED)
def _give(job, n, last, m, sums):
    """Totals of four rows' sums to the result; a vector of zeros unless one isn't finite."""
    y = times(totals(sums[0], sums[1], sums[2], sums[3]), splat(_LOWERED))
    store_four(job.out + m * job.out_row + n * 4, y, last - n)
    return minus(y, y)


@njit(forceinline=True, **COMPILED)
def _lay(to, scales, biases, x_scales, x_sums, sums):
    """Lay what four rows' sums are scaled by for a vector of runs, and add the biases' part to the sums."""
    of_x = load(x_scales)
    store(to, times(scales[0], of_x))
    store(to + VECTOR_BYTES, times(scales[1], of_x))
    store(to + 2 * VECTOR_BYTES, times(scales[2], of_x))
    store(to + 3 * VECTOR_BYTES, times(scales[3], of_x))
    of_x = load(x_sums)
    return (
        fma(biases[0], of_x, sums[0]),
        fma(biases[1], of_x, sums[1]),
        fma(biases[2], of_x, sums[2]),
        fma(biases[3], of_x, sums[3]),
    )


@njit(forceinline=True, **COMPILED)
def _add(sums, packed, x, laid, bits, width, chunks, runs):
    """Add the products of a step of x with four rows, scaled, to the sums."""
    bits, width, chunks, runs = literally(bits), literally(width), literally(chunks), literally(runs)
    products = (
        to_floats(dot(packed[0], x, bits, width, chunks)),
        to_floats(dot(packed[1], x, bits, width, chunks)),
        to_floats(dot(packed[2], x, bits, width, chunks)),
        to_floats(dot(packed[3], x, bits, width, chunks)),
    )
    return (
        fma(products[0], spread(laid, runs), sums[0]),
        fma(products[1], spread(laid + VECTOR_BYTES, runs), sums[1]),
        fma(products[2], spread(laid + 2 * VECTOR_BYTES, runs), sums[2]),
        fma(products[3], spread(laid + 3 * VECTOR_BYTES, runs), sums[3]),
    )


@cache
def four_rows(bits: int, run: int, sharing: int, width: int, together: int) -> Any:
    """Kernel over rows of the weight, four at a time, which share the loads of x.

    x has a scale for each `run` of elements; `sharing` of them have one of the weight's in common, 0 if all have.
    Rows of x are taken `together`, one or two, which share the unpacking of codes.
    """
    step = step_codes(bits, run)
    chunks, step_runs = step // chunk_codes(bits), step // run
    packed_step, codes_step, vector_steps = step * bits // 8, step * width // 8, LANES // step_runs
    several = LANES // sharing if sharing else 1
    next_groups = several if sharing else 0

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        steps = (job.in_features + step - 1) // step
        laid = job.scratch + thread * job.scratch_size
        beside, ahead, bad = job.biases - job.scales, rows_ahead(job), zero()
        kind, next_scales = job.kind, next_groups * job.scale_step
        for n in range(first, last, 4):
            numbers = four(n, last)
            packed, scales = rows_of(job, numbers), scales_of(job, numbers)
            for m in range(0, job.rows, together):
                m1, near = min(m + 1, job.rows - 1), n + ahead if m == 0 else n
                x, x1 = job.codes + m * job.codes_row, job.codes + m1 * job.codes_row
                xs, xs1 = job.code_scales + m * job.code_scales_row, job.code_scales + m1 * job.code_scales_row
                x_sums, x_sums1 = job.sums + m * job.sums_row, job.sums + m1 * job.sums_row
                near_codes, near_scales = job.packed + near * job.packed_row, job.scales + near * job.scale_row
                sums = sums1 = (zero(), zero(), zero(), zero())
                for start in range(0, steps, vector_steps):
                    vector = start // vector_steps
                    at, xi = vector * next_scales, vector * VECTOR_BYTES
                    left = job.groups - vector * next_groups
                    s = spread_first(further(scales, at), kind, several, left)
                    b = s if beside == 0 else spread_first(further(scales, at + beside), kind, several, left)
                    sums = _lay(laid, s, b, xs + xi, x_sums + xi, sums)
                    if together == 2:
                        sums1 = _lay(laid + 4 * VECTOR_BYTES, s, b, xs1 + xi, x_sums1 + xi, sums1)
                    prefetch_lines(near_scales + 4 * at, 4 * next_scales)
                    if beside != 0:
                        prefetch_lines(near_scales + beside + 4 * at, 4 * next_scales)
                    for i in range(start, min(start + vector_steps, steps)):
                        p, xi, li = further(packed, i * packed_step), i * codes_step, (i - start) * step_runs * 4
                        prefetch_lines(near_codes + 4 * i * packed_step, 4 * packed_step)
                        sums = _add(sums, p, x + xi, laid + li, bits, width, chunks, step_runs)
                        if together == 2:
                            li += 4 * VECTOR_BYTES
                            sums1 = _add(sums1, p, x1 + xi, laid + li, bits, width, chunks, step_runs)
                bad = minus(bad, _give(job, n, last, m, sums))
                if together == 2:
                    bad = minus(bad, _give(job, n, last, m1, sums1))
        if total(bad) != 0:
            job.refused = 1  # not finite: floats must answer

    return kernel
