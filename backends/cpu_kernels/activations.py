"""Rows of x as integers of 16 or 8 bits, a scale for each run of at most 64, in the order of the dots.

The error that this makes is measured as it is made, so that rows which integers don't serve (an element far larger than
the others of its run, values that aren't finite) are refused, and computed in floats.
"""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import cfunc, njit
from quantcore_backends.cpu_kernels.job import COMPILED, KERNEL, STAMP, floats_at, integers_at, job_at
from quantcore_backends.cpu_kernels.simd_int import Form, chunk_codes, form, lane_codes
from quantcore_backends.cpu_kernels.vectors import LANES

__all__ = ["block_height", "rounder", "run_length", "step_codes"]

_RUN: Final = 64
_TINY: Final = np.float32(1e-30)


def run_length(group: int | None) -> int:
    """Elements of x that share a scale where a group of the weight has `group`."""
    return _RUN if group is None else min(group, _RUN)


def step_codes(bits: int, run: int) -> int:
    """Codes that the kernels for few rows take at a time: whole chunks, and whole runs."""
    return max(chunk_codes(bits), run)


@njit(**COMPILED, fastmath={"reassoc", "nsz", "contract"})
def rounded(x, run, top, integers):
    """Round a run of x to integers up to `top`: scale, sum, squared error, squared length, largest magnitude."""
    largest = np.float32(0)
    for k in range(run):
        largest = max(largest, abs(x[k]))
    serves = largest >= _TINY
    inverse = top / largest if serves else np.float32(0)
    scale = largest / top if serves else np.float32(0)
    count, error, square = np.int64(0), np.float32(0), np.float32(0)
    for k in range(run):
        integer = np.rint(x[k] * inverse)
        off = x[k] - integer * scale
        error += off * off
        square += x[k] * x[k]
        integers[k] = np.int32(integer)
        count += np.int64(integer)
    return scale, count, error, square, largest


@njit(**COMPILED)
def block_height(left, height):
    """Rows of the next block, of `left` that remain: blocks are `height` high, the last one a multiple of four."""
    return min(height, (left + 3) // 4 * 4)


@cache
def rounder(bits: int, run: int, width: int, height: int) -> Any:
    """Kernel that makes rows of x integers of `width` bits, with a scale for each `run`.

    With height 0 they are for the kernels of few rows: in the order of :func:`simd_int.dot`, the scales spread over
    lanes as the sums will be. Else they are for blocks of `height` rows: run by run, the words of each row after
    another, beside them the rows' scales, and those times the sums of the integers.
    """
    each, step = lane_codes(bits), step_codes(bits, run)
    layers, parts = form(bits, width)
    planes, words, lanes, run_bytes = each // parts, run // each, run * LANES // step, run * width // 8
    most = {Form(1, 2): 32767, Form(1, 4): 127, Form(2, 4): 127 * 256 + 127}[Form(layers, parts)]
    top = np.float32(most)
    shift, mask = np.int32(32 // parts), np.int32((1 << 32 // parts) - 1)

    stamp = STAMP

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address if stamp else 0)
        columns, bound = job.in_features, np.float32(job.bound * 1e-18)
        runs = (columns + run - 1) // run
        if not height:
            runs = (columns + step - 1) // step * (step // run)
        padded, integers = np.zeros(run, np.float32), np.empty(run, np.int32)
        for m in range(first, last):
            x = floats_at(job.x + m * job.x_row, columns)
            error, square, largest = np.float32(0), np.float32(0), np.float32(0)
            total, group_of = 0.0, 0
            sums = floats_at(job.sums + m * job.sums_row, job.groups)
            for r in range(runs):
                start = r * run
                length = min(run, columns - start)
                if length == run:
                    scale, count, off, its, peak = rounded(x[start : start + run], run, top, integers)
                else:
                    for k in range(run):
                        padded[k] = x[start + k] if k < length else np.float32(0)
                    scale, count, off, its, peak = rounded(padded, run, top, integers)
                error += off
                square += its
                largest = max(largest, peak)
                its_height = block_height(job.rows - m // height * height, height) if height else 0
                block = m // height * height if height else 0
                at = block * runs + r * its_height
                codes = integers_at(job.codes + m * job.codes_row, runs * layers * words * planes)
                if height:
                    codes = integers_at(job.codes + (at + m - block) * run_bytes, layers * words * planes)
                    beside = floats_at(job.code_scales + at * 8, 2 * its_height)
                    beside[m - block] = scale
                    beside[its_height + m - block] = scale * count
                else:
                    scales = floats_at(job.code_scales + m * job.code_scales_row, runs * lanes)
                    scales[r * lanes : (r + 1) * lanes] = scale
                    if start // job.group != group_of:
                        if group_of < job.groups:
                            sums[group_of] = total
                        total, group_of = 0.0, start // job.group
                    total += np.float64(scale) * count
                # The integers in words, one from each part of the weight's words.
                for layer in range(layers):
                    for word in range(words):
                        index = start // each + word
                        chunk = (index // LANES * layers + layer) * planes
                        for plane in range(planes):
                            packed = np.int32(0)
                            for part in range(parts):
                                integer = integers[word * each + part * planes + plane]
                                if layer < layers - 1:
                                    integer = (integer + 128) >> 8  # the lower byte counts from -128
                                packed |= (integer & mask) << (part * shift)
                            if height:
                                codes[(layer * words + word) * planes + plane] = packed
                            else:
                                codes[(chunk + plane) * LANES + index % LANES] = packed
            if not height and group_of < job.groups:
                sums[group_of] = total
            if (largest > 0 and not (error <= bound * square and 1e-25 < square < 1e30)) or square != square:
                job.refused = 1

    return kernel
