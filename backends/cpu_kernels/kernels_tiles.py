"""Kernels compiled by Numba: products of many rows of integer activations with packed rows.

A tile is some LANES of the weight's rows over their whole length. Its words are put side by side once, still packed, so
that one vector holds a word of each row; then every block of rows of x goes over it with the sums in registers. Codes
are unpacked in the innermost loop: the tile stays small enough for the nearest caches, and a shift and a mask beside
many multiplications cost little. Codes that cross words are widened to bytes first.

The shape of the blocks follows Goto & van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
"""

from functools import cache
from typing import Any, Final

from quantcore_backends.cpu_kernels.ahead import NOTHING, tile_ahead
from quantcore_backends.cpu_kernels.blocks import block_product
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, cfunc, njit
from quantcore_backends.cpu_kernels.job import KERNEL, addresses_at, job_at, row_of
from quantcore_backends.cpu_kernels.laying import give, held_bits, lay_scales
from quantcore_backends.cpu_kernels.layout import SPARE, VECTORS
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes
from quantcore_backends.cpu_kernels.simd_int import chunk_codes
from quantcore_backends.cpu_kernels.tiles import side_by_side, widen
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES

__all__ = ["OUTPUTS", "tiles"]

OUTPUTS: Final = VECTORS * LANES
"""Rows of the weight in a tile."""


@cache
def _layer(bits: int) -> Any:
    chunk, crossing = chunk_codes(bits), held_bits(bits) != bits

    @njit(forceinline=True, **COMPILED)
    def lay(job, n, count, to, addresses, spare):
        """Put `count` words of a tile's rows side by side, from the row `n` on; codes that cross words as bytes.

        Whole cache lines are read where rows are made of them. What stands in a line before a row's first byte is then
        laid as well; the address behind it is returned.
        """
        before = job.packed % VECTOR_BYTES
        if crossing or before % 4 or job.packed_row % VECTOR_BYTES or n + OUTPUTS > job.safe:
            before = 0
        rows = addresses_at(addresses, LANES)
        for v in range(VECTORS):
            for lane in range(LANES):
                row = row_of(job, min(n + v * LANES + lane, job.out_features - 1)) - before
                if crossing:
                    widened = spare + lane * (job.tile_words * 4 + SPARE)
                    for code in range(0, count * 4, chunk):
                        widen(row + code * bits // 8, widened + code, bits)
                    row = widened
                rows[lane] = row
            for word in range(0, before // 4 + count, LANES):
                side_by_side(addresses, word * 4, to + (word * VECTORS + v) * VECTOR_BYTES, VECTORS * VECTOR_BYTES)
        return to + before // 4 * VECTORS * VECTOR_BYTES

    return lay


@cache
def tiles(bits: int, run: int, width: int, height: int) -> Any:
    """Kernel over tiles of the weight's rows, for blocks of `height` rows of x, a multiple of four.

    x has a scale for each `run` of elements.
    """
    held, lay = held_bits(bits), _layer(bits)

    @cfunc(KERNEL, cache=True, **COMPILED)
    def kernel(address, thread, first, last):
        job = job_at(address)
        runs = (job.in_features + run - 1) // run
        group_runs = job.group_runs
        laid = job.scratch + thread * job.scratch_size
        scales = laid + (job.tile_words + LANES) * (VECTORS * VECTOR_BYTES)
        sums = scales + (job.groups + LANES - 1) // LANES * LANES * (2 * VECTORS * VECTOR_BYTES)
        addresses = sums + (job.rows + 3) // 4 * 4 * (VECTORS * VECTOR_BYTES)
        spare = addresses + 8 * LANES
        for n in range(first * OUTPUTS, min(last * OUTPUTS, job.out_features), OUTPUTS):
            tile = lay(job, n, runs * run * held // 32, laid, addresses, spare)
            lay_scales(job, n, VECTORS, 0, job.groups, scales, addresses)
            clear_bytes(sums, (job.rows + 3) // 4 * 4 * (VECTORS * VECTOR_BYTES))
            for m in range(0, job.rows, height):
                x = job.codes + m * runs * (run * width // 8)
                x_scales, to = job.code_scales + m * runs * 8, sums + m * (VECTORS * VECTOR_BYTES)
                ahead = tile_ahead(job, n + OUTPUTS, OUTPUTS, 0, runs) if m == 0 else NOTHING
                if job.rows - m > 4:
                    block_product(
                        x,
                        x_scales,
                        tile,
                        scales,
                        to,
                        runs,
                        group_runs,
                        ahead,
                        height,
                        VECTORS,
                        run,
                        width,
                        held,
                    )
                else:
                    block_product(x, x_scales, tile, scales, to, runs, group_runs, ahead, 4, VECTORS, run, width, held)
            give(job, sums, 0, n, 1, VECTORS)

    return kernel
