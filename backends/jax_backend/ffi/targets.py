"""Registering the targets with XLA, and calling them: the door between JAX and the compiled handlers.

Nothing is compiled or registered before the first product is lowered for the CPU: a target that was registered before
XLA's CPU client is up keeps it from starting, if anything is wrong with it.
"""

import threading
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from quantcore_backends.cpu_kernels import compiled, integer, layout
from quantcore_backends.cpu_kernels.threads import thread_count
from quantcore_backends.jax_backend.ffi import abi
from quantcore_backends.jax_backend.ffi.block import OPERATIONS

__all__ = ["KINDS", "decode", "load", "load_rounded", "product", "unusable"]

KINDS: Final = {dtype.name: kind for dtype, kind in compiled.KINDS.items()}
_lock: Final = threading.Lock()


@cache
def unusable() -> str:
    """Why the compiled targets can't be used in this process; empty where they can."""
    if not compiled.available():
        return 'Numba is not there, or QUANTCORE_COMPILED is 0; pip install "quantcore-arrays[fast]"'
    return abi.mismatch(jax.ffi.include_dir())


def product(
    x: Any, leaves: Any, which: Any, scheme: Any, columns: int, *, along_rows: bool, width: int | None = None
) -> Any:
    """Products of x with chosen weights of a stack, by one call of a compiled target.

    Parameters
    ----------
    x : array, shape (P, M, C), float32
    leaves : tuple of array, shape (E, N, *)
        packed, scales and biases; the latter two of one dtype, float32, float16 or bfloat16.
    which : array, shape (P,), int32
        The weight of each product.
    scheme : Scheme
    columns : int
        Logical length of the grouped axis.
    along_rows : bool
        Whether C is N instead of `columns`.
    width : {8, 16, 24}, optional
        Bits of the integers that x is rounded to at first; not along the rows. After 8 follow 16 where those would lose
        too much of x; then floats.

    Returns
    -------
    array, shape (P, M, N), or (P, M, columns) along the rows, float32
    """
    packed, scales, _ = leaves
    products, count, _ = x.shape
    operation = "along_rows" if along_rows else "one_row" if count == 1 else "few_rows"
    spec = _spec(operation, scheme, columns, scales.dtype.name, width or 0)
    if width:
        load_rounded(scheme, width, layout.together(count, integer.UNTILED_ROWS))
    turned = not (along_rows or width)
    shape = (products, count, columns if along_rows else packed.shape[1])
    if turned:
        shape = (products, packed.shape[1], count)
    out = jax.ffi.ffi_call("quantcore_product", jax.ShapeDtypeStruct(shape, jnp.float32))(x, *leaves, which, spec=spec)
    return jnp.swapaxes(out, 1, 2) if turned else out


def decode(leaves: Any, place: Any, height: int, scheme: Any, columns: int) -> Any:
    """Rows of one weight of a stack, dense: ``code * scale + bias``, each rounded.

    Parameters
    ----------
    leaves : tuple of array, shape (E, N, *)
        As for `product`.
    place : array, shape (2,), int32
        Which weight, and the first row.
    height : int
        How many rows.
    scheme : Scheme
    columns : int

    Returns
    -------
    array, shape (height, columns), float32
    """
    spec = _spec("decode", scheme, columns, leaves[1].dtype.name)
    out = jax.ShapeDtypeStruct((1, height, columns), jnp.float32)
    return jax.ffi.ffi_call("quantcore_decode", out)(*leaves, place, spec=spec)[0]


def _spec(operation: str, scheme: Any, columns: int, dtype: str, width: int = 0) -> np.ndarray[Any, Any]:
    """The attribute of a call, with the kernel that it names loaded."""
    kind = KINDS[dtype]
    span = scheme.group_size or compiled.ROW_SPAN
    number = load(operation, scheme.bits, kind)
    values = (number, kind, scheme.bits, columns, scheme.group_size or 0, span, max(1, compiled.FLUSH // span))
    return np.asarray([*values, operation == "along_rows", width], np.int64)


@cache
def load(operation: str, bits: int, kind: int) -> int:
    """Compile a body, or read it from the cache, and put it into the table; its place there."""
    from quantcore_backends.jax_backend.ffi import bodies, frame

    with _lock:
        _register()
        place = frame.FIRST_BODY + (OPERATIONS.index(operation) * 8 + bits - 1) * len(KINDS) + kind
        frame.TABLE[place] = bodies.body(operation, bits, kind).address
        return place


@cache
def load_rounded(scheme: Any, width: int, together: int) -> None:
    """Likewise the kernels for rows of x rounded to integers, of those widths that are worth it here.

    `together` is as of :func:`layout.together`.
    """
    from quantcore_backends.jax_backend.ffi import jobs

    with _lock:
        _register()
        for tried in integer.widths(scheme, width, tiled=not together):
            jobs.load(scheme, tried, together)


@cache
def _register() -> None:
    from quantcore_backends.jax_backend.ffi import frame, handlers, parts, pool

    with open(abi.header(jax.ffi.include_dir()), encoding="utf-8") as file:
        (frame.TABLE[0], frame.TABLE[1]), _, _ = abi.read_header(file.read())
    pool.install(thread_count())
    parts.install()
    jax.devices("cpu")
    for name, handler in (("quantcore_product", handlers.product), ("quantcore_decode", handlers.decode)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.address), platform="cpu")
