"""Kernel compiled by Numba: affine codes of the rows of a weight, in one pass, packed."""

from functools import cache
from typing import Any

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, bytes_at, floats_at, job_at, words_at
from quantcore_backends.cpu_kernels.simd import LANES, greatest, larger, least, load, scale_at, smaller, splat

__all__ = ["encoder"]

_BLOCK = 8  # codes, which take `bits` bytes


@njit(**COMPILED)
def together(codes, bits):
    """Eight codes, one a byte, as a bitstream: neighbours joined, then pairs, then fours."""
    word = codes
    for level in range(3):
        width = np.uint64(8 << level)
        kept = np.uint64(bits << level)
        low = np.uint64(0xFFFFFFFFFFFFFFFF) // ((np.uint64(1) << width) + np.uint64(1))
        word = (word & low) | ((word >> width) & low) << kept
    return word


@njit(**COMPILED, fastmath={"reassoc"})
def nothing(x):
    """0, or NaN where an element isn't finite."""
    total = np.float32(0)
    for k in range(x.size):
        total += x[k] * np.float32(0)
    return total


@njit(**COMPILED)
def ends(x):
    """Least and greatest element, which are finite."""
    low = high = splat(x[0])
    whole = x.size // LANES * LANES
    for k in range(0, whole, LANES):
        vector = load(x.ctypes.data + k * 4)
        low, high = smaller(vector, low), larger(vector, high)
    bottom, peak = least(low), greatest(high)
    for k in range(whole, x.size):
        bottom, peak = min(bottom, x[k]), max(peak, x[k])
    return bottom, peak


@njit(**COMPILED)
def scale_groups(lows, highs, top, scales, biases):
    """Scale and bias of each group; LLVM computes several at once."""
    for g in range(lows.size):
        low, high = lows[g], highs[g]
        scale = max((high - low) / top, np.float32(1e-7))
        from_low = abs(low) > abs(high)
        scale = scale if from_low else -scale
        edge = low if from_low else high
        steps = np.rint(edge / scale)
        scales[g] = edge / steps if steps != 0 else scale
        biases[g] = edge if steps != 0 else np.float32(0)


@njit(**COMPILED)
def round_to_codes(x, scale, bias, top, codes):
    for k in range(x.size):
        code = np.rint((x[k] - bias) / scale)
        codes[k] = np.uint8(np.int32(min(max(code, np.float32(0)), top)))


@njit(**COMPILED)
def refuse_groups(x, group, scales, biases):
    """Make scale and bias NaN where an element of the group isn't finite."""
    for g in range(scales.size):
        if nothing(x[g * group : min((g + 1) * group, x.size)]) != 0:
            scales[g] = biases[g] = np.nan


@njit(**COMPILED)
def widen_row(source, kind, to):
    """A row of float16 or bfloat16, as `kind` says, to float32."""
    if kind == 1:
        for k in range(to.size):
            to[k] = scale_at(source + 2 * k, 1)
    else:
        for k in range(to.size):
            to[k] = scale_at(source + 2 * k, 2)


@cache
def encoder(bits: int) -> Any:
    """Kernel over rows of float32, float16 or bfloat16 (the job's kind, as in :func:`simd.scale_at`), 2 bits or more.

    It gives scales and biases in float32, before they are rounded to the weight's dtype. Where a group isn't finite its
    scale is NaN.

    Notes
    -----
    The rule is that of MLX 0.32's CPU kernel: see :func:`quantcore.quantize`.
    """
    top = np.float32((1 << bits) - 1)
    # Eight codes fill a word, and LLVM joins several at once; in other widths words of 64 bits overlap.
    word = {2: np.uint16, 4: np.uint32}.get(bits, np.uint64)
    fills = bits in (2, 4, 8)

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        columns = job.in_features
        blocks = (columns + _BLOCK - 1) // _BLOCK
        converted = np.empty(columns, np.float32)
        lows, highs = np.empty(job.groups, np.float32), np.empty(job.groups, np.float32)
        codes = np.zeros(blocks * _BLOCK, np.uint8)
        stream = np.empty(blocks * bits + 8, np.uint8)
        for n in range(first, last):
            source = job.x + n * job.x_row
            if job.kind != 0:
                widen_row(source, job.kind, converted)
                source = converted.ctypes.data
            x = floats_at(source, columns)
            scales = floats_at(job.scales + n * job.scale_row, job.groups)
            biases = floats_at(job.biases + n * job.scale_row, job.groups)
            for g in range(job.groups):
                start = g * job.group
                lows[g], highs[g] = ends(x[start : min(start + job.group, columns)])
            scale_groups(lows, highs, top, scales, biases)
            for g in range(job.groups):
                start = g * job.group
                stop = min(start + job.group, columns)
                # Slices, whose indices Numba needn't test for being negative.
                round_to_codes(x[start:stop], scales[g], biases[g], top, codes[start:stop])
            if nothing(x) != 0:
                refuse_groups(x, job.group, scales, biases)
            eights = words_at(codes.ctypes.data, blocks)
            if fills:
                words = stream[: blocks * bits].view(word)
                for block in range(blocks):
                    words[block] = together(eights[block], bits)
            else:
                for block in range(blocks):
                    words_at(stream.ctypes.data + block * bits, 1)[0] = together(eights[block], bits)
            packed = bytes_at(job.packed + n * job.packed_row, job.packed_row)
            used = min(blocks * bits, job.packed_row)
            for k in range(used):  # on Intel several times as fast as an assignment of slices
                packed[k] = stream[k]
            packed[used:] = 0

    return kernel
