"""Kernels compiled by Numba: products of few rows of integer activations with packed rows.

The products of a run of codes are summed exactly, as integers; the sum is scaled by x's scale, then by the weight's.
The biases enter as ``bias * sum(x)`` over the group, the sum being that of the rounded x: that of the exact x would
leave the rounding error times the bias, which is most of the weight's range.
"""

from functools import cache
from typing import Any, Final

from quantcore_backends.cpu_kernels.activations import step_codes
from quantcore_backends.cpu_kernels.disk_cache import cfunc, njit
from quantcore_backends.cpu_kernels.job import COMPILED, KERNEL, floats_at, job_at, row_of
from quantcore_backends.cpu_kernels.simd import fma, load, prefetch, times, total, zero
from quantcore_backends.cpu_kernels.simd_int import (
    chunk_codes,
    dot,
    spread,
    spread_first,
    to_floats,
)
from quantcore_backends.cpu_kernels.vectors import LANES

__all__ = ["LINE", "four_rows", "prefetch_rows", "rows_ahead"]


_AHEAD: Final = 8192
"""Bytes of the weight, at least, between what is multiplied and what is prefetched."""
LINE: Final = 64


@njit(**COMPILED)
def rows_ahead(job):
    """How many rows lie, in whole blocks of four, between those that are multiplied and those that are prefetched."""
    four = 4 * job.packed_row
    return 4 * max(1, (_AHEAD + four - 1) // four)


@njit(forceinline=True, **COMPILED)
def prefetch_rows(job, n, codes, scales):
    """Begin to bring four rows from `n` on near, while others are at `codes` and `scales` bytes after their start.

    Lines of codes follow one another, unlike what four rows read: the hardware then sees one stream through the weight,
    and keeps more lines under way than are asked for here.
    """
    address = job.packed + n * job.packed_row + 4 * (codes - codes % LINE)
    prefetch(address)
    prefetch(address + LINE)
    prefetch(address + 2 * LINE)
    prefetch(address + 3 * LINE)
    beside = n * job.scale_row + 4 * scales
    prefetch(job.scales + beside)
    prefetch(job.biases + beside)


def _biased(kind: int) -> Any:
    """Function that multiplies a row's biases of a kind by the sums of x, lane by lane, and adds."""
    size = (4, 2, 2)[kind]

    @njit(forceinline=True, **COMPILED)
    def biased(biases, sums, groups, lanes):
        whole = groups // LANES
        for g in range(whole):
            lanes = fma(spread(biases + g * LANES * size, kind, LANES), load(sums + g * LANES * 4), lanes)
        left = groups - whole * LANES
        if left:
            few = spread_first(biases + whole * LANES * size, kind, LANES, left)
            lanes = fma(few, spread_first(sums + whole * LANES * 4, 0, LANES, left), lanes)
        return lanes

    return biased


# A kernel that is cached on disk may close over numbers only: of functions, Numba sees no two that are the same.
_biased_float32, _biased_float16, _biased_bfloat16 = _biased(0), _biased(1), _biased(2)


@njit(forceinline=True, **COMPILED)
def biased(job, n, sums, lanes):
    """Lanes to which biases of a row times the sums of x are added."""
    biases = job.biases + n * job.scale_row
    if job.kind == 0:
        return _biased_float32(biases, sums, job.groups, lanes)
    if job.kind == 1:
        return _biased_float16(biases, sums, job.groups, lanes)
    return _biased_bfloat16(biases, sums, job.groups, lanes)


@cache
def four_rows(bits: int, kind: int, run: int, scales: int, width: int) -> Any:
    """Kernel over rows of the weight, four at a time, which share the loads of x.

    x has a scale for each `run` of elements; the weight has `scales` of them in a step, or one for several steps.
    """
    step = step_codes(bits, run)
    chunks = step // chunk_codes(bits)
    packed_step, codes_step = step * bits // 8, step * width // 8

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        whole, left = job.in_features // step, job.in_features % step
        valid = (left + job.group - 1) // job.group
        at = (whole * scales >> job.group_shift) * job.scale_step
        ahead = rows_ahead(job)
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
                    if m == 0 and pi % LINE < packed_step:
                        prefetch_rows(job, n + ahead, pi, si)
                    a0 = times(to_floats(dot(p0 + pi, xi, bits, width, chunks)), xv)
                    a1 = times(to_floats(dot(p1 + pi, xi, bits, width, chunks)), xv)
                    a2 = times(to_floats(dot(p2 + pi, xi, bits, width, chunks)), xv)
                    a3 = times(to_floats(dot(p3 + pi, xi, bits, width, chunks)), xv)
                    t0, t1 = fma(a0, spread(s0 + si, kind, scales), t0), fma(a1, spread(s1 + si, kind, scales), t1)
                    t2, t3 = fma(a2, spread(s2 + si, kind, scales), t2), fma(a3, spread(s3 + si, kind, scales), t3)
                if left:
                    xi, pi, xv = x + whole * codes_step, whole * packed_step, load(xs + whole * (LANES * 4))
                    if m == 0:
                        prefetch_rows(job, n + ahead, pi, si)
                    a0 = times(to_floats(dot(p0 + pi, xi, bits, width, chunks)), xv)
                    a1 = times(to_floats(dot(p1 + pi, xi, bits, width, chunks)), xv)
                    a2 = times(to_floats(dot(p2 + pi, xi, bits, width, chunks)), xv)
                    a3 = times(to_floats(dot(p3 + pi, xi, bits, width, chunks)), xv)
                    t0 = fma(a0, spread_first(s0 + at, kind, scales, valid), t0)
                    t1 = fma(a1, spread_first(s1 + at, kind, scales, valid), t1)
                    t2 = fma(a2, spread_first(s2 + at, kind, scales, valid), t2)
                    t3 = fma(a3, spread_first(s3 + at, kind, scales, valid), t3)
                sums = job.sums + m * job.sums_row
                out = floats_at(job.out + m * job.out_row, job.out_features)
                y0, y1 = total(biased(job, n, sums, t0)), total(biased(job, n1, sums, t1))
                y2, y3 = total(biased(job, n2, sums, t2)), total(biased(job, n3, sums, t3))
                out[n], out[n1], out[n2], out[n3] = y0, y1, y2, y3
                if y0 - y0 + y1 - y1 + y2 - y2 + y3 - y3 != 0:
                    job.refused = 1  # not finite: floats must answer

    return kernel
