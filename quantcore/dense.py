"""Dense operands: the same call surface where no operand is quantized, and what both kinds of operand go through."""

import math
from typing import Any, Final

import numpy as np

from quantcore import arrays, dispatch, registry
from quantcore.dtypes import REAL_FLOATING, dtype_name, native_dtype, result_dtype
from quantcore.errors import BackendNotFoundError, BackendUnavailableError

__all__ = [
    "cast",
    "check_backend",
    "check_operand",
    "floating",
    "gather",
    "is_simple",
    "matmul",
    "operands",
    "swapped",
    "take",
]

_UNCHECKED: Final = ("mlx",)
"""Libraries whose ``take`` checks no index, and reads past the end of the array."""


def operands(op: str, x: Any, w: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, str]:
    """Namespace, both operands in the dtype to compute in, and the name of the result's dtype."""
    if arrays.library_of(x) != arrays.library_of(w):
        raise TypeError(
            f"{op}: x is a {arrays.library_of(x)} array and w a {arrays.library_of(w)} array; nothing moves between "
            "libraries by itself: use quantcore.to_library(array, library)"
        )
    x_device, w_device = arrays.device_of(x), arrays.device_of(w)
    if x_device != w_device and None not in (x_device, w_device):
        raise TypeError(f"{op}: x is on {x_device} and w on {w_device}; nothing moves between devices by itself")
    names = [floating(op, "an operand's dtype", operand.dtype) for operand in (x, w)]
    dispatch.precision_in_force(op, options["precision"])
    check_backend(op, options["backend"])
    name = result_dtype(*names)
    out_dtype = options["out_dtype"]
    wanted = name if out_dtype is None else floating(op, "out_dtype", out_dtype)
    if arrays.library_of(x) == "numpy" and name in ("float16", "bfloat16"):
        name = "float32"  # NumPy has no half-precision matmul worth the name
    return arrays.plain_namespace(x, w), cast(x, name), cast(w, name), wanted


_SIMPLE: Final = (np.dtype(np.float32), np.dtype(np.float64))


def is_simple(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> bool:
    """Whether ``np.matmul(x, w.mT)`` is the product as it stands: shapes that fit, one dtype that NumPy computes in."""
    return x.dtype == w.dtype and x.dtype in _SIMPLE and x.ndim > 0 and w.ndim > 1 and x.shape[-1] == w.shape[-1]


def matmul(op: str, x: Any, w: Any, options: dict[str, Any]) -> Any:
    """Matrix product of two dense operands."""
    check_operand(op, x)
    check_operand(op, w)
    xp, x, w, name = operands(op, x, w, options)
    x_shape, w_shape = tuple(x.shape), tuple(w.shape)
    if x_shape[-1] != w_shape[0 if len(w_shape) == 1 else -2]:
        raise ValueError(f"{op}: the contracted axes of shapes {x_shape} and {w_shape} differ")
    return cast(xp.matmul(x, w), name)


def take(w: Any, indices: Any, axis: int, xp: Any) -> Any:
    """Slices of a dense array along an axis; where the library checks no index, NaN for one out of range."""
    shape = (*w.shape[:axis], *indices.shape, *w.shape[axis + 1 :])
    flat = xp.reshape(indices, (-1,))
    if arrays.library_of(w) not in _UNCHECKED:
        return xp.reshape(xp.take(w, flat, axis=axis), shape)
    length = w.shape[axis]
    nothing = xp.asarray(float("nan") if dtype_name(w.dtype) in REAL_FLOATING else 0, dtype=w.dtype)
    if length == 0:
        return xp.broadcast_to(nothing, shape)
    flat = xp.astype(flat, native_dtype("int64", w))
    inside = xp.logical_and(flat >= -length, flat < length)
    rows = xp.take(w, xp.where(inside, flat % length, 0), axis=axis)
    mask = xp.reshape(inside, (*(1,) * axis, -1, *(1,) * (len(w.shape) - axis - 1)))
    return xp.reshape(xp.where(mask, rows, nothing), shape)


def gather(x: Any, w: Any, lhs: Any, rhs: Any, options: dict[str, Any]) -> Any:
    """Products of chosen matrices of x with chosen matrices of w, transposed."""
    xp = arrays.plain_namespace(x)
    lhs, rhs = xp.broadcast_arrays(lhs, rhs)
    left, right = (
        take(xp.reshape(stack, (math.prod(stack.shape[:-2]), *stack.shape[-2:])), which, 0, xp)
        for stack, which in ((x, xp.reshape(lhs, (-1,))), (w, xp.reshape(rhs, (-1,))))
    )
    product = matmul("gather_dot", left, swapped(right), options)
    return xp.reshape(product, (*lhs.shape, *product.shape[-2:]))


def swapped(array: Any) -> Any:
    """The array with its last two axes swapped; a 1-D one as it is."""
    return arrays.plain_namespace(array).matrix_transpose(array) if len(array.shape) > 1 else array


def cast(array: Any, name: str) -> Any:
    """The array in the dtype of that name; itself where it is so already."""
    if dtype_name(array.dtype) == name:
        return array
    return arrays.plain_namespace(array).astype(array, native_dtype(name, array))


# --- any operand -------------------------------------------------------------------------------------------------


def floating(op: str, what: str, dtype: Any) -> str:
    """Name of a dtype that must be real floating."""
    name = dtype_name(dtype)
    if name not in REAL_FLOATING:
        raise TypeError(f"{op}: {what} must be real floating ({', '.join(REAL_FLOATING)}), not {name}; cast it")
    return name


def check_backend(op: str, name: Any) -> None:
    """Raise unless a name, which dense operands need none of, is None or that of a backend that is there."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"{op}: backend must be a string, not {type(name).__name__}")
    try:
        registry.find(name, registry.snapshot())
    except (BackendNotFoundError, BackendUnavailableError) as error:
        raise type(error)(f"{op}: {error}") from error


def check_operand(op: str, operand: Any) -> None:
    """Raise unless `operand` is an array with at least one axis."""
    if not arrays.is_array(operand):
        raise TypeError(f"{op}: an operand is of type {type(operand).__name__}, not an array or a QuantizedTensor")
    if len(operand.shape) == 0:
        raise ValueError(f"{op}: an operand has no axis (a 0-d array); products need at least one")
