"""Codes to and from little-endian bitstreams, in array-API code."""

from typing import Any, Final

import numpy as np
from array_api_compat import array_namespace, device

__all__ = ["constant", "pack", "unpack"]

Array = Any

_WORD: Final = 32


def constant(values: np.ndarray[Any, Any], like: Array) -> Array:
    """A constant in the library and on the device of `like`."""
    xp = array_namespace(like)
    if hasattr(like, "device"):
        return xp.asarray(values, device=device(like))
    return xp.asarray(values)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row.

    Parameters
    ----------
    packed : array, shape (..., W), uint32
    bits : int
    count : int

    Returns
    -------
    array, shape (..., count), uint32, or int64 where the library can't shift uint32
    """
    xp = array_namespace(packed)
    words = xp.astype(packed, _shiftable(xp))
    mask = (1 << bits) - 1
    if _WORD % bits == 0:
        shifts = constant(np.arange(0, _WORD, bits), packed)
        codes = xp.bitwise_and(words[..., None] >> xp.astype(shifts, words.dtype), _scalar(mask, words))
        return xp.reshape(codes, (*packed.shape[:-1], packed.shape[-1] * (_WORD // bits)))[..., :count]
    first, shift, crosses = _positions(count, bits)
    second = np.minimum(first + 1, max(packed.shape[-1] - 1, 0))
    back = np.where(crosses, _WORD - shift, 0)
    low = xp.take(words, constant(first, packed), axis=-1) >> _typed(shift, words)
    high = xp.take(words, constant(second, packed), axis=-1) << _typed(back, words)
    high = xp.where(constant(crosses, packed), high, _scalar(0, words))
    return xp.bitwise_and(xp.bitwise_or(low, high), _scalar(mask, words))


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes : array, shape (..., K), uint32 or int64
        Each below ``2**bits``.
    bits : int

    Returns
    -------
    array, shape (..., ceil(K * bits / 32)), uint32
    """
    xp = array_namespace(codes)
    *leading, count = codes.shape
    words = -(-count * bits // _WORD)
    missing = -count % _WORD
    if missing:
        codes = xp.concat([codes, xp.zeros_like(codes[..., :1] * _typed(np.zeros(missing, np.int64), codes))], axis=-1)
    blocks = xp.reshape(codes, (*leading, (count + missing) // _WORD, _WORD))
    first, shift, crosses = _positions(_WORD, bits)
    low = blocks << _typed(shift, codes)
    high = blocks >> _typed(np.where(crosses, _WORD - shift, 0), codes)
    made = []
    for word in range(bits):
        here = np.flatnonzero(first == word)
        parts = low[..., int(here[0]) : int(here[-1]) + 1]
        value = _or_all(parts)
        spilled = np.flatnonzero(crosses & (first + 1 == word))
        if spilled.size:
            value = xp.bitwise_or(value, high[..., int(spilled[0])])
        made.append(value)
    packed = xp.reshape(
        xp.stack(made, axis=-1), (*leading, -1 if 0 not in leading else (count + missing) * bits // _WORD)
    )
    packed = packed[..., :words]
    if packed.dtype != xp.uint32:
        packed = xp.astype(xp.bitwise_and(packed, _scalar(0xFFFFFFFF, packed)), xp.uint32)
    return packed


def _positions(count: int, bits: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Per code: the word in which it starts, at which bit, and whether it goes on in the next one."""
    start = np.arange(count, dtype=np.int64) * bits
    first, shift = start // _WORD, start % _WORD
    return first, shift, shift + bits > _WORD


def _or_all(values: Array) -> Array:
    """Bitwise or over the last axis, by halves."""
    xp = array_namespace(values)
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        folded = xp.bitwise_or(values[..., :half], values[..., half : 2 * half])
        values = folded if values.shape[-1] % 2 == 0 else xp.concat([folded, values[..., -1:]], axis=-1)
    return values[..., 0]


def _shiftable(xp: Any) -> Any:
    # torch has no shifts for uint32
    return xp.int64 if xp.__name__.endswith("torch") else xp.uint32


def _scalar(value: int, like: Array) -> Array:
    return _typed(np.asarray(value, np.int64), like)


def _typed(values: np.ndarray[Any, Any], like: Array) -> Array:
    return array_namespace(like).astype(constant(values, like), like.dtype)
