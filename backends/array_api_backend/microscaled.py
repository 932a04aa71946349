"""Microscaled codes (mxfp4, mxfp8, nvfp4) from groups of weights and weights from such codes, in array-API code.

Elements and scales are small floats; what their bits mean is in tables. Source: OCP Microscaling Formats (MX)
specification 1.0, and MLX's ``mx.quantize`` for nvfp4 and for how the power of two is chosen.
"""

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace

from quantcore.dtypes import dtype_name
from quantcore_backends.array_api_backend import indexing
from quantcore_backends.array_api_backend.bitstream import constant

__all__ = ["decode_codes", "encode_groups"]

Array = Any


@dataclass(frozen=True)
class _Float:
    """A float of a few bits: fraction bits, the least and largest exponents, the largest finite code, all values."""

    fraction: int
    least: int
    largest: int
    top: int
    values: np.ndarray[Any, Any]

    @property
    def sign(self) -> int:
        """The bit that makes a code negative."""
        return len(self.values) // 2


def _values(dtype: Any, count: int) -> np.ndarray[Any, Any]:
    return np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64)


_E2M1: Final = _Float(1, 0, 2, 7, _values(ml_dtypes.float4_e2m1fn, 16))
_E4M3: Final = _Float(3, -6, 8, 126, _values(ml_dtypes.float8_e4m3fn, 256))
_POWERS: Final = _values(ml_dtypes.float8_e8m0fnu, 256)
_BIAS: Final = 127

_ELEMENTS: Final = {"mxfp4": _E2M1, "nvfp4": _E2M1, "mxfp8": _E4M3}
_SCALES: Final = {"mxfp4": _POWERS, "mxfp8": _POWERS, "nvfp4": _E4M3.values}


def encode_groups(w: Array, mode: str) -> tuple[Array, Array, None]:
    """Codes of elements and of scales, by the rules of plugins.md.

    Parameters
    ----------
    w : array, shape (..., G, group), float32
    mode : {"mxfp4", "mxfp8", "nvfp4"}

    Returns
    -------
    codes : array, shape (..., G, group), float32
    scales : array, shape (..., G), float32
        Both whole numbers.
    """
    xp = array_namespace(w)
    element = _ELEMENTS[mode]
    needed = xp.max(xp.abs(w), axis=-1, keepdims=True) / float(element.values[element.top])
    scales = _nearest(needed, _E4M3) if mode == "nvfp4" else _power_above(needed, element)
    by = _looked_up(_SCALES[mode], scales, w.dtype)
    empty = by == 0
    scaled = xp.where(empty, xp.zeros_like(w), w / xp.where(empty, xp.ones_like(by), by))
    codes = _nearest(xp.abs(scaled), element)
    return xp.where(scaled < 0, codes + element.sign, codes), scales[..., 0], None


def decode_codes(codes: Array, scales: Array, mode: str, dtype: Any) -> Array:
    """``element * scale``, both looked up."""
    with np.errstate(over="ignore"):  # scales reach further than products of float32
        elements, by = _looked_up(_ELEMENTS[mode].values, codes, dtype), _looked_up(_SCALES[mode], scales, dtype)
        return elements * by


def _looked_up(table: np.ndarray[Any, Any], codes: Array, dtype: Any) -> Array:
    xp = array_namespace(codes)
    return indexing.take(constant(table.astype(dtype_name(dtype)), codes), xp.astype(codes, xp.int32), 0)


def _nearest(magnitude: Array, kind: _Float) -> Array:
    """Code of the float nearest to each magnitude, halves to even; the largest beyond it."""
    xp = array_namespace(magnitude)
    above = xp.zeros_like(magnitude)
    for exponent in range(kind.least + 1, kind.largest + 1):
        above = above + xp.astype(magnitude >= 2.0**exponent, magnitude.dtype)
    steps = 2.0 ** np.arange(kind.least - kind.fraction, kind.largest - kind.fraction + 1)
    step = _looked_up(steps, above, magnitude.dtype)
    return xp.clip(above * 2.0**kind.fraction + xp.round(magnitude / step), 0.0, float(kind.top))


def _power_above(needed: Array, kind: _Float) -> Array:
    """Code of the least power of two that isn't below `needed`; that of 1 for zero.

    None whose product with an element would leave float32's range.
    """
    xp = array_namespace(needed)
    highest = float(_BIAS + 127 - kind.largest)
    exponent = xp.ceil(xp.log2(xp.where(needed == 0, xp.ones_like(needed), needed)))
    code = xp.clip(exponent + float(_BIAS), 1.0, highest)
    below, here = (_looked_up(_POWERS, candidate, needed.dtype) for candidate in (code - 1.0, code))
    code = xp.where(below >= needed, code - 1.0, code)  # a logarithm may be rounded past a whole number
    code = xp.where(here < needed, code + 1.0, code)
    return xp.where(needed == 0, xp.full_like(code, float(_BIAS)), xp.clip(code, 0.0, highest))
