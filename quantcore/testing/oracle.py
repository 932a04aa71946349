"""What the numbers should be: plugins.md's rules in plain NumPy, sharing no code with any backend or with the core.

Everything here is written for being checked by eye against the rules, not for speed. Decoding goes through
``np.unpackbits``, encoding one group at a time, products in float64.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from quantcore.scheme import Scheme

__all__ = [
    "BOUNDS",
    "MICROSCALED",
    "decode_codes",
    "dequantize",
    "encode",
    "encode_group",
    "exact_weight",
    "gather_product",
    "half_ulp",
    "nmse",
    "numpy_dtype",
    "pack_codes",
    "product",
    "product_dtype",
    "small_floats",
    "take",
    "tensordot",
]

Array: TypeAlias = np.ndarray[Any, Any]

BOUNDS: Final[Mapping[str, float]] = MappingProxyType({"highest": 1e-12, "default": 1e-8, "fast": 1e-4})
"""Largest NMSE of any row of x, by precision."""

_SIGNIFICAND: Final = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
_LOWEST_EXPONENT: Final = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}
_F32: Final = np.float32


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is that of ``ml_dtypes``."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


# --- the bitstream --------------------------------------------------------------------------------------------


def decode_codes(packed: Array, bits: int, count: int) -> Array:
    """Codes of packed rows: code i takes the bits from ``i * bits`` of the row's little-endian bitstream.

    Parameters
    ----------
    packed : array, shape (..., W), uint32 of any byte order
    bits : int
    count : int
        Codes in a row.

    Returns
    -------
    array, shape (..., count), int64
    """
    octets = np.ascontiguousarray(packed, "<u4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")[..., : count * bits]
    places = stream.reshape(*packed.shape[:-1], count, bits).astype(np.int64)
    return places @ (1 << np.arange(bits, dtype=np.int64))


def pack_codes(codes: Array, bits: int) -> Array:
    """The inverse of :func:`decode_codes`; spare bits at a row's end are zero.

    Parameters
    ----------
    codes : array, shape (..., K), integers below ``2**bits``
    bits : int

    Returns
    -------
    array, shape (..., ceil(K * bits / 32)), uint32
    """
    *leading, count = codes.shape
    words = -(-count * bits // 32)
    stream = np.zeros((*leading, words * 32), np.uint8)
    places = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    stream[..., : count * bits] = places.reshape(*leading, count * bits)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


# --- encoding -------------------------------------------------------------------------------------------------


def encode_group(values: Array, bits: int) -> tuple[Array, np.float32, np.float32]:
    """Codes, scale and bias of one group, by plugins.md's rules 1 to 4, all in float32.

    Parameters
    ----------
    values : array, shape (G,), float32, finite
    bits : int

    Returns
    -------
    codes : array, shape (G,), int64
    scale, bias : numpy.float32

    Notes
    -----
    One bit has no rule 2 or 3: the bias is the smallest value and the scale the whole range. MLX 0.32 rounds its
    codes half to even like the others, so that the middle of the range is code 0.
    """
    top = _F32(2**bits - 1)
    low, high = values[np.argmin(values)], values[np.argmax(values)]
    with np.errstate(over="ignore"):
        scale = max((high - low) / top, _F32(1e-7))
        bias = low
        if bits > 1:
            from_low = abs(low) > abs(high)
            scale = scale if from_low else -scale
            edge = low if from_low else high
            steps = np.rint(edge / scale)
            scale, bias = (edge / steps, edge) if steps != 0 else (scale, _F32(0))
        codes = np.clip(np.rint((values - bias) / scale), 0, top)
    return codes.astype(np.int64), scale, bias


def small_floats(exponent_bits: int, fraction_bits: int) -> Array:
    """What each code of a small float stands for, in float64, no code being an infinity or NaN.

    From the high end: a sign bit, the exponent E and the fraction F below 1. The value is ``2**(E - bias) * (1 + F)``,
    or ``2**(1 - bias) * F`` where E is 0; the bias is ``2**(exponent_bits - 1) - 1``.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + fraction_bits)):
        exponent, fraction = code >> fraction_bits, (code % 2**fraction_bits) / 2**fraction_bits
        values.append(math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))
    return np.asarray(values + [-value for value in values])


_E2M1: Final = small_floats(2, 1)
_E4M3: Final = small_floats(4, 3)
_E4M3[[127, 255]] = np.nan
_E8M0: Final = np.ldexp(1.0, np.arange(256) - 127)
_E8M0[255] = np.nan

MICROSCALED: Final[Mapping[str, tuple[Array, Array]]] = MappingProxyType(
    {"mxfp4": (_E2M1, _E8M0), "mxfp8": (_E4M3, _E8M0), "nvfp4": (_E2M1, _E4M3)}
)
"""What codes of elements and of scales stand for, by mode."""


def _nearest(value: float, table: Array) -> int:
    """Code of the float nearest to a magnitude, of two as near the even one; the largest beyond it."""
    finite = table[: len(table) // 2]
    distance = np.abs(np.where(np.isnan(finite), np.inf, finite) - value)
    nearest = np.flatnonzero(distance == distance.min())
    return int(nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0])


def encode_microscaled_group(values: Array, mode: str) -> tuple[Array, int]:
    """Codes of elements, and the code of the scale, of one group.

    The scale is the least power of two that isn't below the largest magnitude / the largest element, none so large that
    a product could leave float32's range; 1 for zeros; in nvfp4 the nearest e4m3. Quotients are in float32.
    """
    elements, scales = MICROSCALED[mode]
    needed = np.max(np.abs(values)) / _F32(np.nanmax(elements))
    if mode == "nvfp4":
        code = _nearest(float(needed), scales)
    else:
        allowed = [c for c in range(255) if scales[c] * np.nanmax(elements) <= np.finfo(np.float32).max]
        fitting = [c for c in allowed if scales[c] >= needed]
        code = 127 if needed == 0 else min(fitting, default=max(allowed))
    scale = _F32(scales[code])
    scaled = values / scale if scale else np.zeros_like(values)
    codes = [_nearest(abs(float(v)), elements) + (len(elements) // 2 if v < 0 else 0) for v in scaled]
    return np.asarray(codes, np.int64), code


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
    """Quantize along the last axis, one group after the other.

    Parameters
    ----------
    w : array, shape (..., N, K), float16, bfloat16 or float32, finite
        Where K isn't whole groups, the last one is encoded as if its last element were repeated.
    scheme : Scheme

    Returns
    -------
    packed : array, shape (..., N, ceil(K * bits / 32)), uint32
    scales, biases : array, shape (..., N, groups), w's dtype
        Of the microscaled modes: uint8, and None.
    """
    *leading, columns = w.shape
    group = scheme.group_size or columns
    rows = w.astype(np.float32).reshape(-1, columns)
    groups = -(-columns // group)
    codes = np.zeros((len(rows), columns), np.int64)
    if scheme.mode != "affine":
        bytes_ = np.zeros((len(rows), groups), np.uint8)
        for i, j in np.ndindex(len(rows), groups):
            here = slice(j * group, (j + 1) * group)
            codes[i, here], bytes_[i, j] = encode_microscaled_group(rows[i, here], scheme.mode)
        return pack_codes(codes.reshape(w.shape), scheme.bits), bytes_.reshape(*leading, groups), None
    scales, biases = np.zeros((len(rows), groups), np.float32), np.zeros((len(rows), groups), np.float32)
    for i, row in enumerate(rows):
        for j in range(groups):
            here = slice(j * group, (j + 1) * group)  # repeating the last element changes neither edge
            codes[i, here], scales[i, j], biases[i, j] = encode_group(row[here], scheme.bits)
    native = w.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):
        rounded = [part.astype(native).reshape(*leading, groups) for part in (scales, biases)]
    return pack_codes(codes.reshape(w.shape), scheme.bits), rounded[0], rounded[1]


# --- decoding -------------------------------------------------------------------------------------------------


def _spread(values: Array, scheme: Scheme, columns: int) -> Array:
    """One scale or bias per element."""
    group = scheme.group_size or columns
    return np.repeat(values, group, axis=-1)[..., :columns]


def exact_weight(packed: Array, scales: Array, biases: Array | None, scheme: Scheme, columns: int) -> Array:
    """The weight that the arrays stand for, ``code * scale + bias`` or ``element * scale`` in float64.

    Returns
    -------
    array, shape (..., N, columns), float64
    """
    if biases is None:
        elements, of_groups = MICROSCALED[scheme.mode]
        return elements[decode_codes(packed, scheme.bits, columns)] * _spread(of_groups[scales], scheme, columns)
    codes = decode_codes(packed, scheme.bits, columns).astype(np.float64)
    scale, bias = (_spread(part.astype(np.float64), scheme, columns) for part in (scales, biases))
    return codes * scale + bias


def dequantize(packed: Array, scales: Array, biases: Array | None, scheme: Scheme, columns: int, dtype: str) -> Array:
    """The contract's dense weight: product, then sum, in float32, each rounded; then one rounding to `dtype`.

    An element times its scale is exact, so that in the microscaled modes only float32's range limits it.

    Returns
    -------
    array, shape (..., N, columns), `dtype`
    """
    if biases is None:
        with np.errstate(over="ignore"):
            exact = exact_weight(packed, scales, None, scheme, columns).astype(np.float32)
            return exact.astype(numpy_dtype(dtype))
    codes = decode_codes(packed, scheme.bits, columns).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        scale, bias = (_spread(part.astype(np.float32), scheme, columns) for part in (scales, biases))
        scaled = codes * scale
        return (scaled + bias).astype(numpy_dtype(dtype))


# --- products -------------------------------------------------------------------------------------------------


def product(x: Array, w: Array) -> Array:
    """``matmul(x, matrix_transpose(w))`` in float64, by einsum's plain loops: no BLAS, which backends may use.

    Parameters
    ----------
    x : array, shape (..., M, K) or (K,)
    w : array, shape (..., N, K)

    Returns
    -------
    array, shape (..., M, N) or (..., N), float64
    """
    x, w = (np.ascontiguousarray(operand, np.float64) for operand in (x, w))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.einsum("...k,...nk->...n" if x.ndim == 1 else "...mk,...nk->...mn", x, w))


def tensordot(x: Array, w: Array, axes: int | tuple[Sequence[int], Sequence[int]]) -> Array:
    """``tensordot`` in float64."""
    return np.tensordot(x.astype(np.float64), w.astype(np.float64), axes=axes)


def take(w: Array, indices: Array, axis: int) -> Array:
    """Slices of a dense weight."""
    return np.take(w, indices, axis=axis)


def gather_product(x: Array, w: Array, lhs: Array, rhs: Array) -> Array:
    """Product of matrix ``lhs[i]`` of x with weight ``rhs[i]``, in float64.

    Parameters
    ----------
    x : array, shape (..., M, K)
    w : array, shape (..., N, K)
    lhs, rhs : array of integers
        Flat indices into the leading axes; they broadcast.

    Returns
    -------
    array, shape broadcast(lhs, rhs).shape + (M, N), float64
    """
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    flat_x, flat_w = (stack.reshape(math.prod(stack.shape[:-2]), *stack.shape[-2:]) for stack in (x, w))
    return product(flat_x[lhs], flat_w[rhs])


def product_dtype(x: str, w: str) -> str:
    """Result dtype of a product: equal ones stay, float16 with bfloat16 gives float32, else the wider."""
    if {x, w} == {"float16", "bfloat16"}:
        return "float32"
    order = ("float64", "float32", "float16", "bfloat16")
    return min(x, w, key=order.index)


# --- error ----------------------------------------------------------------------------------------------------


def half_ulp(values: Array, dtype: str) -> Array:
    """Half the distance between neighbours of `dtype` at `values`: the most that rounding to it moves them."""
    size = np.abs(values.astype(np.float64))
    _, exponent = np.frexp(size)
    exponent = np.where(size == 0, _LOWEST_EXPONENT[dtype], np.maximum(exponent - 1, _LOWEST_EXPONENT[dtype]))
    return np.asarray(np.ldexp(0.5, exponent - _SIGNIFICAND[dtype] + 1))


def nmse(error: Array, y: Array, x: Array, w: Array) -> float:
    """Error of the worst row of x: ``Σe² / max(Σy², ‖x‖² · Σₙ‖wₙ‖² / K)``.

    Parameters
    ----------
    error, y : array, shape (..., M, N) or (..., N), float64
        Computed minus true result, and the true result; finite.
    x : array, shape (..., M, K) or (K,)
    w : array, shape (..., N, K)

    Returns
    -------
    float
        0 where there is no row.

    Notes
    -----
    The second part of the denominator is what Σy² would be if x and the rows of w were in random directions; it
    keeps rows whose products cancel from counting as inexact.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    if x.ndim == 1:
        x, error, y = x[None, :], error[..., None, :], y[..., None, :]
    if 0 in error.shape[:-1]:
        return 0.0
    of_x = np.square(x).sum(axis=-1)
    of_w = np.square(w).sum(axis=(-1, -2))
    expected = of_x * of_w[..., None] / max(x.shape[-1], 1)
    whole = np.maximum(np.square(y).sum(axis=-1), expected)
    wrong = np.square(error).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(wrong == 0, 0.0, wrong / whole)
    worst = float(ratio.max())
    return math.inf if math.isnan(worst) else worst
