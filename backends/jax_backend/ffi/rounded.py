"""Products with x rounded to integers: of as few bits as are asked for and serve, else in floats.

Of 24 bits, or tiles of floats where x has many rows, or first of 8 where that is asked for, then of 16. So many rows
of x are done in one go as bound the memory: a product's rows in parts, or several products of few rows together.
"""

from typing import Final

from numba import carray

from quantcore_backends.cpu_kernels import integer
from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, njit
from quantcore_backends.jax_backend.ffi import jobs
from quantcore_backends.jax_backend.ffi.block import in_block, in_spec
from quantcore_backends.jax_backend.ffi.bodies import floats
from quantcore_backends.jax_backend.ffi.frame import error, free, load64, malloc, store64
from quantcore_backends.jax_backend.ffi.operands import (
    EXHAUSTED,
    INVALID,
    bytes_at,
    no_body,
    no_memory,
    run_few_rows,
)

__all__ = ["run"]

(_WIDTH,) = in_spec("width")
_X, _WHICH, _OUT, _COUNT, _ROWS, _COLUMNS = in_block("x", "which", "out", "count", "rows", "columns")
_MOST: Final = integer.MOST


@njit(**INLINED)
def _tried(frame, spec, block, product, products, row, count, served):
    """Multiply by as few bits as are asked for and serve, and mark what is done; False without memory."""
    first = load64(spec + _WIDTH)
    enough = True
    for width in (24, 8, 16, integer.FLOATS):
        wanted = width == first or (width == 16 and first == 8) or (width == integer.FLOATS and first == 24)
        if enough and wanted and served.sum() < products and jobs.has_kernel(spec, block, width):
            enough = jobs.multiply(frame, spec, block, product, products, row, count, width, served)
    return enough


@njit(**INLINED)
def _floats(frame, spec, block, product, row, count):
    """Some rows of one product in floats, the block being for all of them; 0, or an error."""
    all_rows, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    x, which, out = load64(block + _X), load64(block + _WHICH), load64(block + _OUT)
    first = product * all_rows + row
    made = out + 4 * first * rows
    turned = made if count == 1 else malloc(4 * count * rows)
    if turned == 0:
        return error(frame, no_memory(), EXHAUSTED)
    store64(block + _X, x + 4 * first * columns)
    store64(block + _WHICH, which + 4 * product)
    store64(block + _OUT, turned)
    store64(block + _COUNT, count)
    failed = run_few_rows(frame, spec, block, 1)
    if count != 1:
        if failed == 0:
            there, here = carray(floats(turned), (rows, count)), carray(floats(made), (count, rows))
            for m in range(count):
                for n in range(rows):
                    here[m, n] = there[n, m]
        free(turned)
    store64(block + _X, x)
    store64(block + _WHICH, which)
    store64(block + _OUT, out)
    store64(block + _COUNT, all_rows)
    return failed


@njit(**INLINED)
def _go(frame, spec, block, product, products, row, count, served):
    """Some rows of some products; 0, or an error."""
    served[:products] = 0
    if not _tried(frame, spec, block, product, products, row, count, served[:products]):
        return error(frame, no_memory(), EXHAUSTED)
    for p in range(products):
        if served[p] == 0:
            failed = _floats(frame, spec, block, product + p, row, count)
            if failed != 0:
                return failed
    return 0


@njit(**CACHED)
def run(frame, spec, block, products):
    """Compute `out` (P, M, N), of the block's operands; 0, or an error."""
    if load64(spec + _WIDTH) != 24 and not jobs.has_kernel(spec, block, 16):
        return error(frame, no_body(), INVALID)
    count, failed = load64(block + _COUNT), 0
    memory = malloc(_MOST)
    if memory == 0:
        return error(frame, no_memory(), EXHAUSTED)
    served = carray(bytes_at(memory), _MOST)
    together = max(1, _MOST // max(1, count))
    for product in range(0, products, together):
        for row in range(0, count, _MOST):
            if failed == 0:
                some, part = min(together, products - product), min(_MOST, count - row)
                failed = _go(frame, spec, block, product, some, row, part, served)
    free(memory)
    return failed
