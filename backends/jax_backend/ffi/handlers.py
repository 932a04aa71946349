"""The XLA handlers: they check the buffers, set out the operands, and run a body on all of them.

Every length is checked against the attribute's and against one another's, so that a module that was put together
wrongly gives an error of XLA's, not a read out of bounds.
"""

from typing import Any, Final

from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels import kernels
from quantcore_backends.jax_backend.ffi import bodies, pool
from quantcore_backends.jax_backend.ffi.abi import CONSTANTS, OFFSETS
from quantcore_backends.jax_backend.ffi.bodies import FIELDS
from quantcore_backends.jax_backend.ffi.frame import (
    OPTIONS,
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
    table,
)

__all__ = ["SPEC", "decode", "product"]

SPEC: Final = ("body", "kind", "bits", "columns", "group", "span", "flush", "along_rows")
"""The integers of the attribute, in order; `group` is 0 where the row is one."""

_BODY, _KIND, _BITS, _IN_FEATURES, _GROUP, _SPAN, _FLUSH, _ALONG_ROWS = range(0, 64, 8)
_SPEC_SIZE = len(SPEC)
_BLOCK = 8 * len(FIELDS)
_OVERREAD = 16
_DATA = OFFSETS["Buffer.data"]
_F32, _F16, _BF16 = CONSTANTS["DataType_F32"], CONSTANTS["DataType_F16"], CONSTANTS["DataType_BF16"]
_U32, _S32 = CONSTANTS["DataType_U32"], CONSTANTS["DataType_S32"]
_INVALID, _EXHAUSTED = CONSTANTS["Error_Code_INVALID_ARGUMENT"], CONSTANTS["Error_Code_RESOURCE_EXHAUSTED"]
_CHUNK_ROWS, _CHUNK_COLUMNS = bodies.CHUNK_ROWS, bodies.CHUNK_COLUMNS

(_X, _PACKED, _SCALES, _BIASES, _WHICH, _OUT, _SUMS, _TAIL, _COUNT, _ROWS, _COLUMNS) = range(0, 88, 8)
(_STACK, _SPAN_OUT, _FLUSH_OUT, _ROW, _SCALE_ROW, _STEP, _SAFE, _CHUNKS, _START, _HEIGHT) = range(88, 168, 8)


def _text(value: str) -> Any:
    """A Numba function that gives the address of a C string."""

    @intrinsic
    def address(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ptrtoint(context.insert_const_string(builder.module, value), ir.IntType(64))

        return types.int64(), generate

    return address


_no_operands = _text("quantcore: the call has other operands or attributes than this version gives it")
_no_shapes = _text("quantcore: the shapes of x, packed, scales and biases don't fit")
_no_body = _text("quantcore: the kernel isn't loaded; quantcore.jax.load() loads it in a process that didn't trace it")
_no_memory = _text("quantcore: out of memory")

_floats, _doubles = bodies._floats, bodies._doubles
_bytes = bodies._pointer(types.uint8)


@njit(**OPTIONS)
def _set_weight(block, spec, packed, scales, biases):
    """Write down a stack of weights; False where it isn't one of that scheme."""
    kind = load64(spec + _KIND)
    dtype = _F32 if kind == 0 else (_F16 if kind == 1 else _BF16)
    if not (is_array(packed, _U32, 3) and is_array(scales, dtype, 3) and is_array(biases, dtype, 3)):
        return False
    columns, bits, group = load64(spec + _IN_FEATURES), load64(spec + _BITS), load64(spec + _GROUP)
    stack, rows, words = dimension(packed, 0), dimension(packed, 1), dimension(packed, 2)
    groups = 1 if group == 0 else (columns + group - 1) // group
    if columns < 1 or words != (columns * bits + 31) // 32:
        return False
    for part in (scales, biases):
        if dimension(part, 0) != stack or dimension(part, 1) != rows or dimension(part, 2) != groups:
            return False
    size = 4 if kind == 0 else 2
    store64(block + _PACKED, load64(packed + _DATA))
    store64(block + _SCALES, load64(scales + _DATA))
    store64(block + _BIASES, load64(biases + _DATA))
    store64(block + _STACK, stack)
    store64(block + _ROWS, rows)
    store64(block + _COLUMNS, columns)
    store64(block + _SPAN_OUT, load64(spec + _SPAN))
    store64(block + _FLUSH_OUT, load64(spec + _FLUSH))
    store64(block + _ROW, 4 * words)
    store64(block + _SCALE_ROW, size * groups)
    store64(block + _STEP, size if group else 0)
    past = 0 if 32 % bits == 0 else min(rows, (_OVERREAD + 4 * words - 1) // (4 * words))
    store64(block + _SAFE, rows - past)
    return True


@njit(**OPTIONS)
def _copy_tail(block):
    """The last rows copied to where there is memory behind them that a vector may read; 0 where there is none."""
    rows, row, safe = load64(block + _ROWS), load64(block + _ROW), load64(block + _SAFE)
    length = (rows - safe) * row
    memory = malloc(length + _OVERREAD)
    if memory != 0:
        start = load64(block + _PACKED) + (load64(block + _STACK) * rows * row - length)
        source, target = carray(_bytes(start), length), carray(_bytes(memory), length + _OVERREAD)
        target[:length] = source
        target[length:] = 0
    return memory


@njit(**OPTIONS)
def _run(frame, spec, block, chunks):
    """Run the body over all chunks; an error where it isn't there or has no memory."""
    body = load64(table() + 8 * load64(spec + _BODY))
    if body == 0:
        return error(frame, _no_body(), _INVALID)
    tail = _copy_tail(block)
    if tail == 0:
        return error(frame, _no_memory(), _EXHAUSTED)
    store64(block + _TAIL, tail)
    done = pool.for_chunks(frame, body, block, chunks)
    free(tail)
    return 0 if done else error(frame, _no_memory(), _EXHAUSTED)


@cfunc(types.int64(types.int64), cache=True, boundscheck=False, error_model="numpy")
def product(frame):
    """Of x (P, M, C), packed, scales, biases (E, N, *), which (P,) → (P, N, M), or (P, M, K) along the rows."""
    if answers_query(frame):
        return 0
    x, which, out = argument(frame, 0, 5), argument(frame, 4, 5), result(frame)
    spec = attribute(frame, _SPEC_SIZE)
    if spec == 0 or not (is_array(x, _F32, 3) and is_array(which, _S32, 1) and is_array(out, _F32, 3)):
        return error(frame, _no_operands(), _INVALID)
    block = malloc(_BLOCK)
    if block == 0:
        return error(frame, _no_memory(), _EXHAUSTED)
    if not _set_weight(block, spec, argument(frame, 1, 5), argument(frame, 2, 5), argument(frame, 3, 5)):
        free(block)
        return error(frame, _no_shapes(), _INVALID)
    products, count = dimension(x, 0), dimension(x, 1)
    rows, columns, span = load64(block + _ROWS), load64(block + _COLUMNS), load64(block + _SPAN_OUT)
    along = load64(spec + _ALONG_ROWS)
    contracted = rows if along else columns
    fits = dimension(x, 2) == contracted and dimension(which, 0) == products and dimension(out, 0) == products
    if along:
        fits = fits and dimension(out, 1) == count and dimension(out, 2) == columns
    else:
        fits = fits and dimension(out, 1) == rows and dimension(out, 2) == count
    if not fits or load64(block + _STACK) < 1 or span < 1:
        free(block)
        return error(frame, _no_shapes(), _INVALID)
    spans = (columns + span - 1) // span
    store64(block + _X, load64(x + _DATA))
    store64(block + _WHICH, load64(which + _DATA))
    store64(block + _OUT, load64(out + _DATA))
    store64(block + _COUNT, count)
    height = max(1, _CHUNK_COLUMNS // span) if along else _CHUNK_ROWS
    chunks = ((spans if along else rows) + height - 1) // height
    store64(block + _HEIGHT, height)
    store64(block + _CHUNKS, chunks)
    sums = 0
    if not along:
        sums = malloc(8 * products * count * spans + 8)
        if sums == 0:
            free(block)
            return error(frame, _no_memory(), _EXHAUSTED)
        kernels.span_sums(
            carray(_floats(load64(x + _DATA)), (products * count, columns)),
            products * count,
            columns,
            span,
            carray(_doubles(sums), (products * count, spans)),
        )
        store64(block + _SUMS, sums)
    failed = _run(frame, spec, block, products * chunks)
    free(sums)
    free(block)
    return failed


@cfunc(types.int64(types.int64), cache=True, boundscheck=False, error_model="numpy")
def decode(frame):
    """Of packed, scales, biases (E, N, *), place (2,): weight and first row → that many rows as `out` (1, H, K) has."""
    if answers_query(frame):
        return 0
    place, out = argument(frame, 3, 4), result(frame)
    spec = attribute(frame, _SPEC_SIZE)
    if spec == 0 or not (is_array(place, _S32, 1) and is_array(out, _F32, 3)):
        return error(frame, _no_operands(), _INVALID)
    block = malloc(_BLOCK)
    if block == 0:
        return error(frame, _no_memory(), _EXHAUSTED)
    count = dimension(out, 1)
    if (
        not _set_weight(block, spec, argument(frame, 0, 4), argument(frame, 1, 4), argument(frame, 2, 4))
        or dimension(place, 0) != 2
        or dimension(out, 0) != 1
        or dimension(out, 2) != load64(block + _COLUMNS)
        or count > load64(block + _ROWS)
        or load64(block + _STACK) < 1
    ):
        free(block)
        return error(frame, _no_shapes(), _INVALID)
    at = load64(place + _DATA)
    store64(block + _WHICH, at)
    store64(block + _START, min(max(load32(at + 4), 0), load64(block + _ROWS) - count))
    store64(block + _OUT, load64(out + _DATA))
    store64(block + _COUNT, count)
    store64(block + _HEIGHT, _CHUNK_ROWS)
    chunks = (count + _CHUNK_ROWS - 1) // _CHUNK_ROWS
    store64(block + _CHUNKS, chunks)
    failed = _run(frame, spec, block, chunks)
    free(block)
    return failed
