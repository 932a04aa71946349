"""Judging a result, as NumPy arrays, against what the oracle says. Each raises AssertionError naming the place."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from quantcore.testing import oracle

__all__ = [
    "HALF_ROUNDOFF",
    "check_nonfinite",
    "check_one_of",
    "check_same_bits",
    "product_error",
]

Array: TypeAlias = np.ndarray[Any, Any]

HALF_ROUNDOFF: Final[Mapping[str, float]] = MappingProxyType({"float16": 2.0**-11, "bfloat16": 2.0**-8})
"""Largest relative error of one rounding to a half-precision dtype."""

_UNDERFLOW: Final = 2.0**-150
"""Largest error of a float32 product that underflows gradually."""

_SMALLEST_NORMAL: Final = 2.0**-126


def check_same_bits(actual: Array, expected: Array, what: str) -> None:
    """`actual` has the shape, the dtype and every bit of `expected`; a NaN may be any NaN."""
    check_one_of(actual, (expected,), what)


def check_one_of(actual: Array, expected: tuple[Array, ...], what: str) -> None:
    """Each element of `actual` is, bit for bit, that of one of the arrays in `expected`."""
    first = expected[0]
    assert actual.shape == first.shape, f"{what}: shape {actual.shape} instead of {first.shape}"
    assert actual.dtype.name == first.dtype.name, f"{what}: dtype {actual.dtype} instead of {first.dtype}"
    wrong = np.all([_bits(actual) != _bits(one) for one in expected], axis=0)
    if first.dtype.kind not in "iub":
        wrong &= ~(np.isnan(actual) & np.isnan(first))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} elements differ, the first at {place}: "
            f"{actual[place]!r} instead of {' or '.join(repr(one[place]) for one in expected)}"
        )


def check_nonfinite(actual: Array, y: Array, dtype: str, nan_for_infinity: bool, what: str) -> Array:
    """`actual` is NaN or infinite exactly where `y`, rounded to `dtype`, is.

    Parameters
    ----------
    actual : array
    y : array, float64
        The true product.
    dtype : str
        Of the result.
    nan_for_infinity : bool
        Whether NaN may stand for ±inf.
    what : str

    Returns
    -------
    array of bool
        Where both are finite.
    """
    with np.errstate(over="ignore"):
        rounded = y.astype(oracle.numpy_dtype(dtype)).astype(np.float64)
        largest = float(np.finfo(dtype).max) if dtype != "bfloat16" else 3.3895e38
        at_the_edge = np.isfinite(y) & (np.abs(np.abs(y) / largest - 1) < 0.01)
    got = actual.astype(np.float64)
    right = (np.isfinite(rounded) & np.isfinite(got)) | (np.isnan(rounded) & np.isnan(got)) | (rounded == got)
    if nan_for_infinity:
        right |= np.isinf(rounded) & np.isnan(got)
    wrong = ~right & ~at_the_edge
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {got[place]} at {place} where the float product is {rounded[place]} "
            f"({int(wrong.sum())} of {wrong.size} elements)"
        )
    return np.isfinite(rounded) & np.isfinite(got)


def product_error(
    actual: Array, y: Array, x: Array, w: Array, dtype: str, measured: Array, flushes_subnormals: bool = False
) -> float:
    """NMSE of the worst row of x, the last rounding of half-precision results not counting.

    Parameters
    ----------
    actual : array, shape (..., M, N) or (..., N)
    y : array of the same shape, float64
        The true product.
    x : array, shape (..., M, K) or (K,)
    w : array, shape (..., N, K)
    dtype : str
        Of the result.
    measured : array of bool, of y's shape
        Where both are finite.
    flushes_subnormals : bool
        Whether numbers below the smallest normal one may count as zero.

    Returns
    -------
    float
    """
    got, true = np.where(measured, actual, 0).astype(np.float64), np.where(measured, y, 0.0)
    error = np.abs(got - true)
    if dtype in HALF_ROUNDOFF:
        error = error - oracle.half_ulp(np.maximum(np.abs(got), np.abs(true)), dtype)
    contracted = x.shape[-1]
    lost = _UNDERFLOW
    if flushes_subnormals:
        lost = _SMALLEST_NORMAL * (1 + float(np.abs(w).max(initial=0.0)))
    error = np.maximum(error - contracted * lost, 0.0)
    finite_x = np.where(np.isfinite(x.astype(np.float64)), x, 0)
    return oracle.nmse(error, true, finite_x, w)


def _bits(array: Array) -> Array:
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return native.view(np.dtype(f"u{native.dtype.itemsize}"))
