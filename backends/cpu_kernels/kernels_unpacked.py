"""Kernels compiled by Numba: products of many rows of x with packed rows whose codes are unpacked before.

So products are computed where there are few registers, and in float32. As many columns are done in one go as stay in
the nearest cache when unpacked, of so many rows of the weight that x is seldom read from memory. For floats the weight
is dequantized there, and sums of runs are added in float64: x and the weight may be such that roundings add up.
"""

from functools import cache
from typing import Any, Final, NamedTuple

from quantcore_backends.cpu_kernels.ahead import NOTHING, tile_ahead
from quantcore_backends.cpu_kernels.blocks import unpacked_product
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, INLINED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, doubles_at, floats_at, job_at
from quantcore_backends.cpu_kernels.laying import code_layer, give, held_bits, lay_scales, row_finder
from quantcore_backends.cpu_kernels.layout import FLOAT_WIDTH, SPARE, UNPACKED_COLUMNS, UNPACKED_TILES, VECTORS
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes
from quantcore_backends.cpu_kernels.simd_int import form
from quantcore_backends.cpu_kernels.tiles import floats_of_words, side_by_side
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["unpacked_tiles"]

_OUTPUTS: Final = VECTORS * LANES
"""Rows of the weight in a tile."""
_NEAR: Final = 1 << 21
"""Bytes of x that caches hold: of more, as much as is multiplied by one tile is multiplied by several."""
_LINE: Final = VECTORS * VECTOR_BYTES
"""Bytes of a vector of each of these."""


class _Scratch(NamedTuple):
    """Addresses of a thread's scratch memory; behind `sums`, bytes of a tile's sums."""

    codes: int
    scales: int
    addresses: int
    words: int
    spare: int
    sums: int
    sums_size: int


@njit(**COMPILED)
def _scratch(job, thread, run, width):
    codes = job.scratch + thread * job.scratch_size
    scales = codes + UNPACKED_COLUMNS * 4 * _OUTPUTS
    words = scales + (UNPACKED_COLUMNS // run + LANES) * (2 * _LINE)
    addresses = words + LANES * VECTOR_BYTES
    spare = addresses + 8 * LANES
    sums = spare + LANES * (UNPACKED_COLUMNS + SPARE)
    size = (job.rows + 7) // 8 * 8 * _LINE * (2 if width == FLOAT_WIDTH else 1)
    return _Scratch(codes, scales, addresses, words, spare, sums, size)


@cache
def _float_layer(held: int) -> Any:
    codes = 32 // held

    @njit(**INLINED)
    def lay_floats(job, column, count, v, scratch):
        """Dequantize `count` columns of one of a tile's vectors of rows, from `column` on."""
        words = job.group * held // 32
        scale, left = scratch.scales + v * VECTOR_BYTES, (job.group - column % job.group) * held // 32
        for code in range(0, count, LANES * codes):
            side_by_side(scratch.addresses, code * held // 8, scratch.words, VECTOR_BYTES)
            for word in range(min(LANES, (count - code) // codes)):
                to = scratch.codes + (code + word * codes) * _LINE + v * VECTOR_BYTES
                floats_of_words(scratch.words + word * VECTOR_BYTES, scale, scale + _LINE, to, _LINE, held)
                left -= 1
                if left == 0:
                    scale, left = scale + 2 * _LINE, words

    return lay_floats


@cache
def _layer(bits: int, parts: int) -> Any:
    held = held_bits(bits)
    find_rows, codes = row_finder(bits), 32 // held
    lay_floats: Any = _float_layer(held) if parts == 1 else None
    lay_codes: Any = code_layer(held, parts, VECTORS) if parts != 1 else None

    @njit(**COMPILED)
    def lay(job, n, ahead, column, count, scratch):
        """Unpack `count` codes of a tile's rows from `n` on, those from a column on, and lay their scales.

        Codes of the row that is `ahead` rows further are prefetched, unless that is 0.
        """
        there = min(count, job.in_features - column)
        whole = (there + codes - 1) // codes * codes  # of whole words
        group = column // job.group
        groups = (column + there - 1) // job.group + 1 - group
        lay_scales(job, n, VECTORS, group, groups, scratch.scales, scratch.addresses)
        for v in range(VECTORS):
            spare_row = UNPACKED_COLUMNS + SPARE
            find_rows(job, n + v * LANES, ahead, column, count, scratch.addresses, scratch.spare, spare_row)
            if parts == 1:
                lay_floats(job, column, whole, v, scratch)
            else:
                lay_codes(count, scratch.codes + v * VECTOR_BYTES, scratch.addresses)
        if parts == 1:
            clear_bytes(scratch.codes + whole * _LINE, max(0, count - whole) * _LINE)

    return lay


@cache
def _multiplier(held: int, run: int, width: int, height: int) -> Any:
    run_bytes, row_bytes = run * width // 8, 2 * _LINE if width == FLOAT_WIDTH else _LINE

    @njit(forceinline=True, **COMPILED)
    def multiply(job, m, start, end, tile, ahead, scratch):
        """Add the products of a block of x from row `m` on with what is laid of a tile."""
        before = m * ((job.in_features + run - 1) // run) + start * height
        unpacked_product(
            job.codes + before * run_bytes,
            job.code_scales + before * 8,
            scratch.codes,
            scratch.scales,
            scratch.sums + tile * scratch.sums_size + m * row_bytes,
            end - start,
            job.group_runs - start % job.group_runs,
            job.group_runs,
            ahead,
            height,
            VECTORS,
            run,
            width,
            held,
        )

    return multiply


@njit(**COMPILED)
def _narrow(sums, count):
    """float64 to float32, to the same place."""
    wide, narrow = doubles_at(sums, count), floats_at(sums, count)
    for k in range(count):
        narrow[k] = wide[k]


@cache
def unpacked_tiles(bits: int, run: int, width: int, height: int) -> Any:
    """Kernel over tiles of the weight's rows, for blocks of `height` rows of x, 4 or 8; floats are `FLOAT_WIDTH` wide.

    x has a scale for each `run` of elements, or is given as it is, `run` elements of each row after another.
    """
    held = held_bits(bits)
    lay = _layer(bits, form(held, width).parts)
    multiply, multiply_four = (_multiplier(held, run, width, rows) for rows in (height, 4))
    laid = UNPACKED_COLUMNS // (2 if width == FLOAT_WIDTH else 1) // run

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        runs = (job.in_features + run - 1) // run
        scratch = _scratch(job, thread, run, width)
        near = job.rows * runs * (run * width // 8) <= _NEAR
        together = 1 if near else UNPACKED_TILES
        for part in range(first, last, together):
            tiles = min(together, last - part)
            clear_bytes(scratch.sums, tiles * scratch.sums_size)
            for start in range(0, runs, laid):
                end = min(start + laid, runs)
                for tile in range(tiles):
                    n = (part + tile) * _OUTPUTS
                    lay(job, n, 0 if near else _OUTPUTS, start * run, (end - start) * run, scratch)
                    for m in range(0, job.rows, height):
                        first_one = near and m == 0
                        ahead = tile_ahead(job, n + _OUTPUTS, _OUTPUTS, start, runs) if first_one else NOTHING
                        if height == 4 or job.rows - m > 4:
                            multiply(job, m, start, end, tile, ahead, scratch)
                        else:
                            multiply_four(job, m, start, end, tile, ahead, scratch)
            if width == FLOAT_WIDTH:
                for tile in range(tiles):
                    _narrow(scratch.sums + tile * scratch.sums_size, job.rows * _OUTPUTS)
            give(job, scratch.sums, scratch.sums_size, part * _OUTPUTS, tiles, VECTORS)

    return kernel
