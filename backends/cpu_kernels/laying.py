"""What the kernels of many rows of x share: codes and scales put side by side, and results taken out of tiles."""

from typing import Final

import numpy as np
from numba import literally

from quantcore_backends.cpu_kernels.ahead import prefetch_lines
from quantcore_backends.cpu_kernels.disk_cache import njit
from quantcore_backends.cpu_kernels.job import COMPILED, addresses_at, floats_at, integers_at, row_of
from quantcore_backends.cpu_kernels.simd import load, store
from quantcore_backends.cpu_kernels.tiles import codes_side_by_side, scales_side_by_side, widen
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["find_rows", "give", "held_bits", "lay_codes", "lay_scales"]

_NOT_FINITE: Final = 0x7F800000
"""Bits of infinity: those of a magnitude that isn't finite are no fewer."""


def held_bits(bits: int) -> int:
    """Bits of a code in a tile."""
    return bits if 32 % bits == 0 else 8


@njit(**COMPILED)
def find_rows(job, n, ahead, code, count, addresses, spare, spare_row, bits, held, chunk):
    """Addresses of `count` codes of LANES rows from `n` on, those from `code` on, where each has bits of its own.

    Codes that cross words are widened to bytes before, in `spare`, `spare_row` bytes for each row. Those of the row
    that is `ahead` rows further are prefetched.
    """
    bits, held, chunk = literally(bits), literally(held), literally(chunk)
    rows = addresses_at(addresses, LANES)
    for lane in range(LANES):
        row = row_of(job, min(n + lane, job.out_features - 1)) + code * bits // 8
        prefetch_lines(row + ahead * job.packed_row, count * bits // 8)
        if held != bits:
            widened = spare + lane * spare_row
            for at in range(0, count, chunk):
                widen(row + at * bits // 8, widened + at, bits)
            row = widened
        rows[lane] = row


@njit(**COMPILED)
def lay_codes(count, to, vectors, addresses, held, parts):
    """Unpack `count` codes of LANES rows to one of some vectors, `parts` in each lane of it."""
    held, parts = literally(held), literally(parts)
    for code in range(0, count, LANES * 32 // held):
        at = to + code // parts * (vectors * VECTOR_BYTES)
        codes_side_by_side(addresses, code * held // 8, at, vectors * VECTOR_BYTES, held, parts)


@njit(**COMPILED)
def lay_scales(job, n, vectors, group, groups, to, addresses):
    """Scales and biases of some vectors of rows from `n` on, of so many groups from `group` on, group by group.

    Zeros follow, up to a multiple of LANES groups.
    """
    stride = 2 * vectors * VECTOR_BYTES
    rows = addresses_at(addresses, LANES)
    for v in range(vectors):
        for values, second in ((job.scales, 0), (job.biases, 1)):
            for lane in range(LANES):
                row = min(n + v * LANES + lane, job.out_features - 1)
                rows[lane] = values + row * job.scale_row + group * job.scale_step
            for g in range(0, groups, LANES):
                at, left = g * job.scale_step, groups - g
                place = to + (second * vectors + v) * VECTOR_BYTES + g * stride
                if job.kind == 0:
                    scales_side_by_side(addresses, at, left, place, stride, 0)
                elif job.kind == 1:
                    scales_side_by_side(addresses, at, left, place, stride, 1)
                else:
                    scales_side_by_side(addresses, at, left, place, stride, 2)


@njit(**COMPILED)
def give(job, sums, apart, n, tiles, vectors):
    """Sums of some tiles to the result, each `apart` bytes behind the last. Where one isn't finite, floats must answer.

    A tile has some vectors of rows of the weight, the first tile from `n` on, for each row of x.
    """
    size, most = vectors * VECTOR_BYTES, np.int32(0)
    for tile in range(tiles):
        bits = integers_at(sums + tile * apart, job.rows * size // 4)
        for k in range(len(bits)):
            most = max(most, np.int32(bits[k] & 0x7FFFFFFF))
    if most >= _NOT_FINITE:
        job.refused = 1
    for m in range(job.rows):
        for tile in range(tiles):
            for v in range(vectors):
                at, first = sums + tile * apart + m * size + v * VECTOR_BYTES, n + (tile * vectors + v) * LANES
                to, left = job.out + m * job.out_row + first * 4, job.out_features - first
                if left >= LANES:
                    store(to, load(at))
                elif left > 0:
                    floats_at(to, left)[:] = floats_at(at, left)
