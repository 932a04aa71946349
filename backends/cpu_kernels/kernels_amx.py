"""Kernels compiled by Numba: products of many rows of integer activations with packed rows, in matrix units (AMX).

These multiply so fast that all else counts: codes are unpacked once, for all rows of x, and sums leave the units
through memory, to be scaled in vectors. So few columns are done in one go that several blocks of x and the codes beside
them stay in the nearest cache, of so many rows of the weight that x is seldom read.
"""

from functools import cache
from typing import Any, Final, NamedTuple

from quantcore_backends.cpu_kernels.ahead import prefetch_lines
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, job_at
from quantcore_backends.cpu_kernels.laying import code_layer, give, held_bits, lay_scales, row_finder
from quantcore_backends.cpu_kernels.layout import (
    CONFIGURATION,
    MATRIX_COLUMNS,
    MATRIX_HEIGHT,
    MATRIX_TILES,
    SPARE,
    SPILL,
)
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes
from quantcore_backends.cpu_kernels.simd_amx import configure, matrix_product, release
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["matrix_tiles"]

_LOW: Final = MATRIX_HEIGHT // 2
"""Rows of a last block where that is enough."""
_TOGETHER: Final = 4
"""Blocks of x, at most, that go over the same codes before the next ones: a power of two."""
_NEAREST: Final = 32 * 1024
"""Bytes of them that stay in the nearest cache."""
_PANEL: Final = MATRIX_COLUMNS * LANES
"""Bytes of a tile's codes."""


class _Scratch(NamedTuple):
    """Addresses of a thread's scratch memory; behind `sums`, bytes of a tile's sums."""

    codes: int
    scales: int
    spill: int
    configuration: int
    addresses: int
    spare: int
    sums: int
    sums_size: int


@njit(**COMPILED)
def _scratch(job, thread, run):
    codes = job.scratch + thread * job.scratch_size
    scales = codes + MATRIX_TILES * _PANEL
    spill = scales + MATRIX_TILES * (MATRIX_COLUMNS // run * 2 * VECTOR_BYTES)
    configuration = spill + SPILL
    addresses = configuration + CONFIGURATION
    spare = addresses + 8 * LANES
    sums = spare + LANES * (MATRIX_COLUMNS + SPARE)
    sums_size = (job.rows + _LOW - 1) // _LOW * _LOW * VECTOR_BYTES
    return _Scratch(codes, scales, spill, configuration, addresses, spare, sums, sums_size)


@cache
def _layer(bits: int) -> Any:
    find_rows, lay_codes = row_finder(bits), code_layer(held_bits(bits), 4, 1)

    @njit(**COMPILED)
    def lay(job, n, column, count, to, scratch):
        """Unpack `count` codes of LANES rows from `n` on, those from a column on."""
        find_rows(job, n, LANES, column, count, scratch.addresses, scratch.spare, MATRIX_COLUMNS + SPARE)
        lay_codes(count, to, scratch.addresses)

    return lay


@njit(**COMPILED)
def _prefetch_scales(job, n, group, groups):
    """Begin to bring near what :func:`lay_scales` takes of LANES rows from `n` on."""
    for row in range(n, n + LANES):
        at = row * job.scale_row + group * job.scale_step
        prefetch_lines(job.scales + at, groups * job.scale_step)
        prefetch_lines(job.biases + at, groups * job.scale_step)


@cache
def _multiplier(run: int, layers: int, height: int) -> Any:
    @njit(forceinline=True, **COMPILED)
    def multiply(job, m, first, end, tile, start, group, scratch):
        """Add the products of a block of x from row `m` on with a tile, of some runs.

        What is laid of the tile begins with the run `start` and the group `group`.
        """
        before = m * ((job.in_features + run - 1) // run) + first * height
        beside = tile * (MATRIX_COLUMNS // run) + first // job.group_runs - group
        matrix_product(
            job.codes + before * (run * layers),
            job.code_scales + before * 8,
            scratch.codes + tile * _PANEL + (first - start) * (run * LANES),
            scratch.scales + beside * (2 * VECTOR_BYTES),
            scratch.sums + tile * scratch.sums_size + m * VECTOR_BYTES,
            scratch.spill,
            end - first,
            job.group_runs - first % job.group_runs,
            job.group_runs,
            height,
            run,
            layers,
        )

    return multiply


@cache
def matrix_tiles(bits: int, run: int, width: int) -> Any:
    """Kernel over tiles of LANES of the weight's rows, for blocks of `MATRIX_HEIGHT` rows of x or half as many.

    x has a scale for each `run` of elements.
    """
    layers = width // 8
    lay, multiply, multiply_low = _layer(bits), *(_multiplier(run, layers, rows) for rows in (MATRIX_HEIGHT, _LOW))
    laid, nearest = MATRIX_COLUMNS // run, _NEAREST // (MATRIX_HEIGHT * run * layers)

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        runs = (job.in_features + run - 1) // run
        scratch = _scratch(job, thread, run)
        high = scratch.sums_size // (MATRIX_HEIGHT * VECTOR_BYTES) * MATRIX_HEIGHT
        together = _TOGETHER
        while together > max(1, high // MATRIX_HEIGHT):
            together //= 2
        for part in range(first, last, MATRIX_TILES):
            tiles = min(MATRIX_TILES, last - part)
            clear_bytes(scratch.sums, tiles * scratch.sums_size)
            for start in range(0, runs, laid):
                end, group = min(start + laid, runs), start // job.group_runs
                groups = (end - 1) // job.group_runs + 1 - group
                for tile in range(tiles):
                    n = (part + tile) * LANES
                    lay(job, n, start * run, (end - start) * run, scratch.codes + tile * _PANEL, scratch)
                    to = scratch.scales + tile * laid * (2 * VECTOR_BYTES)
                    lay_scales(job, n, 1, group, groups, to, scratch.addresses)
                    _prefetch_scales(job, n + LANES, group, groups)
                if high:
                    configure(scratch.configuration, MATRIX_HEIGHT, run)
                for block in range(0, high, together * MATRIX_HEIGHT):
                    for at in range(start, end, nearest // together):
                        until = min(at + nearest // together, end)
                        for tile in range(tiles):
                            for m in range(block, min(block + together * MATRIX_HEIGHT, high), MATRIX_HEIGHT):
                                multiply(job, m, at, until, tile, start, group, scratch)
                if high < job.rows:
                    configure(scratch.configuration, _LOW, run)
                    for tile in range(tiles):
                        multiply_low(job, high, start, end, tile, start, group, scratch)
            give(job, scratch.sums, scratch.sums_size, part * LANES, tiles, 1)
        release()

    return kernel
