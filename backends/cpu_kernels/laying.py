"""What the kernels of many rows of x share: codes and scales put side by side, and results taken out of tiles."""

from functools import cache
from typing import Any, Final

import numpy as np

from quantcore_backends.cpu_kernels.ahead import prefetch_lines
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, INLINED, njit
from quantcore_backends.cpu_kernels.job import addresses_at, integers_at, row_of
from quantcore_backends.cpu_kernels.raw_memory import copy_bytes
from quantcore_backends.cpu_kernels.simd import load, store
from quantcore_backends.cpu_kernels.simd_int import chunk_codes
from quantcore_backends.cpu_kernels.tiles import codes_side_by_side, scales_side_by_side, widen
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["code_layer", "give", "held_bits", "lay_scales", "row_finder"]

_NOT_FINITE: Final = 0x7F800000
"""Bits of infinity: those of a magnitude that isn't finite are no fewer."""


def held_bits(bits: int) -> int:
    """Bits of a code in a tile."""
    return bits if 32 % bits == 0 else 8


@cache
def row_finder(bits: int) -> Any:
    """Function that finds the codes of LANES rows where each has bits of its own."""
    chunk, crossing = chunk_codes(bits), held_bits(bits) != bits

    @njit(**INLINED)
    def find_rows(job, n, ahead, code, count, addresses, spare, spare_row):
        """Addresses of `count` codes of rows from `n` on, those from `code` on.

        Codes that cross words are widened to bytes before, in `spare`, `spare_row` bytes for each row. Those of the row
        that is `ahead` rows further are prefetched, unless that is 0.
        """
        rows = addresses_at(addresses, LANES)
        for lane in range(LANES):
            row = row_of(job, min(n + lane, job.out_features - 1)) + code * bits // 8
            prefetch_lines(row + ahead * job.packed_row, count * bits // 8 if ahead else 0)
            if crossing:
                widened = spare + lane * spare_row
                for at in range(0, count, chunk):
                    widen(row + at * bits // 8, widened + at, bits)
                row = widened
            rows[lane] = row

    return find_rows


@cache
def code_layer(held: int, parts: int, vectors: int) -> Any:
    """Function that unpacks codes of LANES rows to one of some vectors, `parts` in each lane of it."""
    stride, together = vectors * VECTOR_BYTES, LANES * 32 // held

    @njit(**INLINED)
    def lay_codes(count, to, addresses):
        """Unpack `count` codes of the rows that lie at the addresses."""
        for code in range(0, count, together):
            codes_side_by_side(addresses, code * held // 8, to + code // parts * stride, stride, held, parts)

    return lay_codes


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
                scales_side_by_side(addresses, at, left, place, stride, job.kind)


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
                    copy_bytes(to, at, 4 * left)
