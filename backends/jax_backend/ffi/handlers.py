"""The XLA handlers: they check the buffers of x and of the result, and have a kernel go over all of them."""

from numba import types

from quantcore_backends.cpu_kernels.disk_cache import cfunc
from quantcore_backends.jax_backend.ffi import bodies, rounded
from quantcore_backends.jax_backend.ffi.block import SPEC, in_block, in_spec
from quantcore_backends.jax_backend.ffi.frame import (
    answers_query,
    argument,
    attribute,
    dimension,
    error,
    free,
    is_array,
    load32,
    load64,
    malloc,
    result,
    store64,
)
from quantcore_backends.jax_backend.ffi.operands import (
    BLOCK,
    DATA,
    EXHAUSTED,
    F32,
    INVALID,
    S32,
    no_memory,
    no_operands,
    no_shapes,
    run,
    run_few_rows,
    set_weight,
)

__all__ = ["decode", "product"]

_SPEC_SIZE = len(SPEC)
_CHUNK_ROWS, _CHUNK_COLUMNS = bodies.CHUNK_ROWS, bodies.CHUNK_COLUMNS
_ALONG_ROWS, _WIDTH = in_spec("along_rows", "width")
_X, _WHICH, _OUT, _COUNT, _ROWS, _COLUMNS = in_block("x", "which", "out", "count", "rows", "columns")
_STACK, _SPAN, _CHUNKS, _START, _HEIGHT = in_block("stack", "span", "chunks", "start", "height")


@cfunc(types.int64(types.int64), cache=True, boundscheck=False, error_model="numpy")
def product(frame):
    """Of x (P, M, C), packed, scales, biases (E, N, *), which (P,) → one of three.

    (P, N, M); or (P, M, N) where x is rounded to integers; or (P, M, K) along the rows.
    """
    if answers_query(frame):
        return 0
    x, which, out = argument(frame, 0, 5), argument(frame, 4, 5), result(frame)
    spec = attribute(frame, _SPEC_SIZE)
    if spec == 0 or not (is_array(x, F32, 3) and is_array(which, S32, 1) and is_array(out, F32, 3)):
        return error(frame, no_operands(), INVALID)
    block = malloc(BLOCK)
    if block == 0:
        return error(frame, no_memory(), EXHAUSTED)
    if not set_weight(block, spec, argument(frame, 1, 5), argument(frame, 2, 5), argument(frame, 3, 5)):
        free(block)
        return error(frame, no_shapes(), INVALID)
    products, count = dimension(x, 0), dimension(x, 1)
    rows, columns, span = load64(block + _ROWS), load64(block + _COLUMNS), load64(block + _SPAN)
    along, width = load64(spec + _ALONG_ROWS), load64(spec + _WIDTH)
    contracted = rows if along else columns
    fits = dimension(x, 2) == contracted and dimension(which, 0) == products and dimension(out, 0) == products
    if along:
        fits = fits and dimension(out, 1) == count and dimension(out, 2) == columns and width == 0
    elif width:
        fits = (
            fits
            and dimension(out, 1) == count
            and dimension(out, 2) == rows
            and (width == 8 or width == 16 or width == 24)
        )
    else:
        fits = fits and dimension(out, 1) == rows and dimension(out, 2) == count
    if not fits or load64(block + _STACK) < 1 or span < 1:
        free(block)
        return error(frame, no_shapes(), INVALID)
    store64(block + _X, load64(x + DATA))
    store64(block + _WHICH, load64(which + DATA))
    store64(block + _OUT, load64(out + DATA))
    store64(block + _COUNT, count)
    if along:
        height = max(1, _CHUNK_COLUMNS // span)
        chunks = ((columns + span - 1) // span + height - 1) // height
        store64(block + _HEIGHT, height)
        store64(block + _CHUNKS, chunks)
        failed = run(frame, spec, block, products * chunks)
    elif width:
        failed = rounded.run(frame, spec, block, products)
    else:
        failed = run_few_rows(frame, spec, block, products)
    free(block)
    return failed


@cfunc(types.int64(types.int64), cache=True, boundscheck=False, error_model="numpy")
def decode(frame):
    """Of packed, scales, biases (E, N, *), place (2,): weight and first row → that many rows as `out` (1, H, K) has."""
    if answers_query(frame):
        return 0
    place, out = argument(frame, 3, 4), result(frame)
    spec = attribute(frame, _SPEC_SIZE)
    if spec == 0 or not (is_array(place, S32, 1) and is_array(out, F32, 3)):
        return error(frame, no_operands(), INVALID)
    block = malloc(BLOCK)
    if block == 0:
        return error(frame, no_memory(), EXHAUSTED)
    count = dimension(out, 1)
    if (
        not set_weight(block, spec, argument(frame, 0, 4), argument(frame, 1, 4), argument(frame, 2, 4))
        or dimension(place, 0) != 2
        or dimension(out, 0) != 1
        or dimension(out, 2) != load64(block + _COLUMNS)
        or count > load64(block + _ROWS)
        or load64(block + _STACK) < 1
    ):
        free(block)
        return error(frame, no_shapes(), INVALID)
    at = load64(place + DATA)
    store64(block + _WHICH, at)
    store64(block + _START, min(max(load32(at + 4), 0), load64(block + _ROWS) - count))
    store64(block + _OUT, load64(out + DATA))
    store64(block + _COUNT, count)
    store64(block + _HEIGHT, _CHUNK_ROWS)
    chunks = (count + _CHUNK_ROWS - 1) // _CHUNK_ROWS
    store64(block + _CHUNKS, chunks)
    failed = run(frame, spec, block, chunks)
    free(block)
    return failed
