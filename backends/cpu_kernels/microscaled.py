"""Microscaled codes (mxfp4, mxfp8, nvfp4) from groups of weights, and what such codes stand for, in NumPy.

The small floats are those of ml_dtypes. Source: OCP Microscaling Formats (MX) specification 1.0, and MLX's
``mx.quantize`` for nvfp4 and for how the power of two is chosen.
"""

from functools import cache
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

__all__ = ["elements", "encode_groups", "scale_table", "scales"]

Array: TypeAlias = np.ndarray[Any, Any]

_E2M1: Final = np.dtype(ml_dtypes.float4_e2m1fn)
_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0: Final = np.dtype(ml_dtypes.float8_e8m0fnu)

_ELEMENTS: Final = {"mxfp4": _E2M1, "nvfp4": _E2M1, "mxfp8": _E4M3}
_SCALES: Final = {"mxfp4": _E8M0, "mxfp8": _E8M0, "nvfp4": _E4M3}
_LARGEST: Final = {_E2M1: np.float32(6), _E4M3: np.float32(448)}
_BIAS: Final = 127
_HIGHEST: Final = {_E2M1: 125, _E4M3: 119}
"""Largest power of two whose product with every element is in float32's range."""


def encode_groups(w: Array, mode: str) -> tuple[Array, Array]:
    """Codes of elements and of scales, by the rules of plugins.md.

    Parameters
    ----------
    w : array, shape (N, G, group), float32
    mode : {"mxfp4", "mxfp8", "nvfp4"}

    Returns
    -------
    codes : array, shape (N, G, group), uint8
    scales : array, shape (N, G), uint8
    """
    kind = _ELEMENTS[mode]
    needed = np.abs(w).max(axis=-1, keepdims=True) / _LARGEST[kind]
    with np.errstate(invalid="ignore"):
        codes = _nearest(needed, _E4M3) if mode == "nvfp4" else _power_above(needed, kind)
        by = scales(codes, mode, np.dtype(np.float32))
        scaled = np.divide(w, by, out=np.zeros_like(w), where=by != 0)
        return _nearest(scaled, kind), codes[..., 0]


def _nearest(values: Array, kind: np.dtype[Any]) -> Array:
    """Codes of the nearest small floats, halves to even, the largest beyond them; -0 is 0."""
    largest = _LARGEST[kind]
    return (np.clip(values, -largest, largest) + np.float32(0)).astype(kind).view(np.uint8)


def _power_above(needed: Array, kind: np.dtype[Any]) -> Array:
    """Code of the least power of two that isn't below `needed`; that of 1 for zero."""
    fraction, exponent = np.frexp(needed)
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    exponent = np.where(needed == 0, 0, np.clip(exponent, -_BIAS, _HIGHEST[kind]))
    return (exponent + _BIAS).astype(np.uint8)


def elements(codes: Array, mode: str, dtype: np.dtype[Any]) -> Array:
    """What codes of elements stand for."""
    return _table(_ELEMENTS[mode], dtype)[codes]


def scales(codes: Array, mode: str, dtype: np.dtype[Any]) -> Array:
    """What codes of scales stand for."""
    return _table(_SCALES[mode], dtype)[codes]


def scale_table(mode: str) -> Array:
    """What each byte stands for as a scale, in float32."""
    return _table(_SCALES[mode], np.dtype(np.float32))


@cache
def _table(kind: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
    count = 16 if kind == _E2M1 else 256
    return np.arange(count, dtype=np.uint8).view(kind).astype(dtype)
