"""What the kernels of many rows of x share: the weight's scales put side by side, and results taken out of tiles."""

from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.disk_cache import njit
from quantcore_backends.cpu_kernels.job import COMPILED, addresses_at, floats_at, integers_at
from quantcore_backends.cpu_kernels.simd import load, scale_at, store
from quantcore_backends.cpu_kernels.tiles import side_by_side
from quantcore_backends.cpu_kernels.vectors import LANES, SCALE_BYTES

__all__ = ["give", "held_bits", "lay_scales"]

_NOT_FINITE: Final = 0x7F800000
"""Bits of infinity: those of a magnitude that isn't finite are no fewer."""


def held_bits(bits: int) -> int:
    """Bits of a code in a tile."""
    return bits if 32 % bits == 0 else 8


def _copies(kind: int) -> Any:
    """Function that copies a row's scales and biases of a kind into a column of a tile's."""
    size = SCALE_BYTES[kind]

    @njit(**COMPILED)
    def copy(scales, biases, first, groups, side, lane, outputs):
        for g in range(first, groups):
            side[2 * g * outputs + lane] = scale_at(scales + g * size, kind)
            side[(2 * g + 1) * outputs + lane] = scale_at(biases + g * size, kind)

    return copy


# A kernel that is cached on disk may close over numbers only: of functions, Numba sees no two that are the same.
_copy_float32, _copy_float16, _copy_bfloat16 = _copies(0), _copies(1), _copies(2)


@njit(**COMPILED)
def lay_scales(job, n, vectors, group, groups, to, addresses):
    """Scales and biases of some vectors of rows from `n` on, of so many groups from `group` on, group by group."""
    outputs = vectors * LANES
    side, rows = floats_at(to, groups * 2 * outputs), addresses_at(addresses, LANES)
    start = group * job.scale_step
    whole = groups // 4 * 4 if job.kind == 0 else 0
    for v in range(vectors if whole else 0):
        for values, second in ((job.scales, 0), (job.biases, 1)):
            for lane in range(LANES):
                row = min(n + v * LANES + lane, job.out_features - 1)
                rows[lane] = values + row * job.scale_row + start
            at = to + (second * outputs + v * LANES) * 4
            for g in range(0, whole, 4):
                side_by_side(addresses, g * 4, at + g * (2 * outputs * 4), 2 * outputs * 4)
    for lane in range(outputs):
        row = min(n + lane, job.out_features - 1)
        scales, biases = job.scales + row * job.scale_row + start, job.biases + row * job.scale_row + start
        if job.kind == 0:
            _copy_float32(scales, biases, whole, groups, side, lane, outputs)
        elif job.kind == 1:
            _copy_float16(scales, biases, whole, groups, side, lane, outputs)
        else:
            _copy_bfloat16(scales, biases, whole, groups, side, lane, outputs)


@njit(**COMPILED)
def give(job, sums, apart, n, tiles, vectors):
    """Sums of some tiles to the result, each `apart` bytes behind the last. Where one isn't finite, floats must answer.

    A tile has some vectors of rows of the weight, the first tile from `n` on, for each row of x.
    """
    size, most = vectors * LANES * 4, np.int32(0)
    for tile in range(tiles):
        bits = integers_at(sums + tile * apart, job.rows * size // 4)
        for k in range(len(bits)):
            most = max(most, np.int32(bits[k] & 0x7FFFFFFF))
    if most >= _NOT_FINITE:
        job.refused = 1
    for m in range(job.rows):
        for tile in range(tiles):
            for v in range(vectors):
                at, first = sums + tile * apart + m * size + v * (LANES * 4), n + (tile * vectors + v) * LANES
                to, left = job.out + m * job.out_row + first * 4, job.out_features - first
                if left >= LANES:
                    store(to, load(at))
                elif left > 0:
                    floats_at(to, left)[:] = floats_at(at, left)
