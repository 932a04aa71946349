"""Rows of x as integers of 24, 16 or 8 bits, a scale for each run of at most 64, in the order of the dots; or floats.

The error that this makes is measured as it is made, so that rows which integers don't serve (an element far larger than
the others of its run, roundings that go one way, values that aren't finite) are refused, and computed in floats.
"""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, floats_at, integers_at, job_at
from quantcore_backends.cpu_kernels.layout import FLOAT_WIDTH
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes, copy_bytes
from quantcore_backends.cpu_kernels.simd_int import Form, chunk_codes, form, lane_codes
from quantcore_backends.cpu_kernels.simd_rounding import place, rounded
from quantcore_backends.cpu_kernels.vectors import LANES

__all__ = ["RAISED", "block_copier", "block_height", "block_rounder", "row_rounder", "run_length", "step_codes"]

_RUN: Final = 64
RAISED: Final = np.float32(1 << 15)
"""How much larger scales of x of 16 and 8 bits are given to the kernels of few rows, and their results by it.

Else the product with a weight's scale would lose digits below float32's normal numbers long before the result does.
"""


_DRIFT: Final = np.float32(25)
"""Squares of the standard deviation of a sum of random losses up to which it passes for one: once in two million."""
_SCALES_LOSE: Final = np.float32(2.0**-22)
"""Of a run's sum, at most, since a scale is a quotient in float32."""


def run_length(group: int | None, width: int = 16) -> int:
    """Elements of x that share a scale where a group of the weight has `group`; or, of floats, that lie together."""
    return _RUN if group is None or width == FLOAT_WIDTH else min(group, _RUN)


def step_codes(bits: int, run: int) -> int:
    """Codes that the kernels for few rows take at a time: whole chunks, and whole runs."""
    return max(chunk_codes(bits), run)


def _top(bits: int, run: int, width: int) -> np.float32:
    """The largest integer: that of its layers, and not more than a lane's sum of products can hold.

    Of 24 bits it stays away from the end, since a float32 of that size is rounded by as much as 1.
    """
    most = {Form(1, 2): 32767, Form(1, 4): 127, Form(2, 4): 127 * 256 + 127, Form(3, 4): (127 * 256 + 126) * 256}
    top: float = most[form(bits, width)]
    if width == 24:
        summed = step_codes(bits, run) // LANES * ((1 << bits) - 1)
        top = min(top, (1 << 31) // summed * 0.999)
    return np.float32(top)


@njit(forceinline=True, **COMPILED)
def _padded(x, start, columns, run, padded):
    """Address of the run of x from `start` on; zeros follow its last column."""
    if start + run <= columns:
        return x + start * 4
    for k in range(run):
        padded[k] = floats_at(x, columns)[start + k] if start + k < columns else np.float32(0)
    return padded.ctypes.data


@njit(forceinline=True, **COMPILED)
def refused(drift, sums, error, square, largest, bound):
    """Whether integers lose too much of a row of x, or it isn't finite.

    `drift` is the sum of what its elements lose, `sums` that of the magnitudes of its runs' sums, of which rounding the
    scales alone loses a little. Where the rest is far more than random losses add up to, they go one way, as those of
    few values that repeat may: a weight with a mean would add them all up.
    """
    beyond = max(abs(drift) - _SCALES_LOSE * sums, np.float32(0))
    if beyond * beyond > max(_DRIFT * error, bound * square):
        return True
    return (largest > 0 and not (error <= bound * square and 1e-25 < square < 1e30)) or square != square


@njit(**COMPILED)
def block_height(left, height):
    """Rows of the next block, of `left` that remain: `height`, or half of it, but four at least."""
    low = max(4, height // 2)
    return min(height, (left + low - 1) // low * low)


@cache
def row_rounder(bits: int, run: int, width: int) -> Any:
    """Kernel that makes rows of x integers of `width` bits for the kernels of few rows.

    They lie in the order of :func:`simd_int.dot`. Beside them the scale of each `run`, and its sum of x; with 24 bits,
    instead of these the sums of the integers of each lane, and behind them those of x of each group of the weight.
    Sums of x are multiplied by the job's `sum_factor`, but for 24 bits.
    """
    step, (layers, parts), top = step_codes(bits, run), form(bits, width), _top(bits, run, width)
    chunk, planes, lanes = chunk_codes(bits), lane_codes(bits) // parts, run * LANES // step
    plane, of_lane, some, element = chunk // planes, run // lanes, min(run, chunk), 32 // parts

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        columns, bound, factor = job.in_features, np.float32(job.bound * 1e-18), np.float32(job.sum_factor)
        runs = (columns + step - 1) // step * (step // run)
        padded, integers = np.zeros(run, np.float32), np.empty(run, np.int32)
        for m in range(first, last):
            x, codes = job.x + m * job.x_row, job.codes + m * job.codes_row
            scales = floats_at(job.code_scales + m * job.code_scales_row, runs)
            sums = job.sums + m * job.sums_row
            of_runs, of_groups = floats_at(sums, runs), floats_at(sums + runs * lanes * 4, job.groups)
            lane_sums = integers_at(sums, job.sums_row // 4)
            clear_bytes(sums, job.sums_row)  # vectors read past the sums
            drift, error, square, largest = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            magnitudes = np.float32(0)
            total, group_of = 0.0, 0
            for r in range(runs):
                start = r * run
                source = _padded(x, start, columns, run, padded)
                scale, count, lost, off, its, peak = rounded(source, integers.ctypes.data, top, run)
                drift += lost
                magnitudes += abs(scale * count)
                error += off
                square += its
                largest = max(largest, peak)
                if width == 24:
                    scales[r] = scale
                    for lane in range(lanes):
                        for k in range(of_lane):
                            lane_sums[r * lanes + lane] += integers[lane * of_lane + k]
                    if start // job.group != group_of:
                        if group_of < job.groups:
                            of_groups[group_of] = total
                        total, group_of = 0.0, start // job.group
                    total += np.float64(scale) * count
                else:
                    scales[r] = scale * RAISED
                    of_runs[r] = scales[r] * count * factor
                # Runs may be parts of a chunk, or several chunks.
                for part in range(0, run, some):
                    within = (start + part) % chunk
                    at = (start + part - within) * layers + within // planes
                    to = codes + at * element // 8
                    place(integers.ctypes.data + part * 4, to, some, some, planes, plane, layers, chunk, element)
            if width == 24 and group_of < job.groups:
                of_groups[group_of] = total
            if refused(drift, magnitudes, error, square, largest, bound):
                job.refused = 1

    return kernel


@cache
def block_rounder(bits: int, run: int, width: int, height: int) -> Any:
    """Kernel that makes rows of x integers of `width` bits for blocks of `height` rows.

    They lie run by run, the words of each row after another; beside them the rows' scales, and those times the sums of
    the integers and the job's `sum_factor`. Both are 0 for rows that fill up the last block, lest it be slow to compute
    with.
    """
    (layers, parts), top = form(bits, width), _top(bits, run, width)
    each, run_bytes = lane_codes(bits), run * width // 8
    planes, element = each // parts, 32 // parts

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        columns, bound, factor = job.in_features, np.float32(job.bound * 1e-18), np.float32(job.sum_factor)
        runs = (columns + run - 1) // run
        padded, integers = np.zeros(run, np.float32), np.empty(run, np.int32)
        for m in range(first, last):
            x = job.x + m * job.x_row
            block = m // height * height
            its_height = block_height(job.rows - block, height)
            drift, error, square, largest = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            magnitudes = np.float32(0)
            for r in range(runs):
                start = r * run
                source = _padded(x, start, columns, run, padded)
                scale, count, lost, off, its, peak = rounded(source, integers.ctypes.data, top, run)
                drift += lost
                magnitudes += abs(scale * count)
                error += off
                square += its
                largest = max(largest, peak)
                at = block * runs + r * its_height
                beside = floats_at(job.code_scales + at * 8, 2 * its_height)
                beside[m - block] = scale
                beside[its_height + m - block] = scale * count * factor
                for more in range(m + 1 - block, its_height if m == job.rows - 1 else 0):
                    beside[more] = 0
                    beside[its_height + more] = 0
                to = job.codes + (at + m - block) * run_bytes
                place(integers.ctypes.data, to, run, each, planes, parts, layers, run, element)
            if refused(drift, magnitudes, error, square, largest, bound):
                job.refused = 1

    return kernel


@cache
def block_copier(run: int, height: int) -> Any:
    """Kernel that puts rows of x in the order of :func:`block_rounder` as they are; zeros fill up the last block."""

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        columns = job.in_features
        runs = (columns + run - 1) // run
        for m in range(first, last):
            x, block = job.x + m * job.x_row, m // height * height
            its_height = block_height(job.rows - block, height)
            for r in range(runs):
                start, at = r * run, (block * runs + r * its_height) * run
                row, there = (m - block) * run, min(run, columns - start)
                to, end = job.codes + (at + row) * 4, its_height * run if m == job.rows - 1 else row + run
                copy_bytes(to, x + start * 4, there * 4)
                clear_bytes(to + there * 4, (end - row - there) * 4)

    return kernel
