"""Codes to and from little-endian bitstreams, vectorised over rows.

Eight codes take exactly `bits` bytes, so both directions work on blocks of eight codes, one code position at a time.
"""

from typing import Any, TypeAlias

import numpy as np

__all__ = ["pack", "unpack"]

Array: TypeAlias = np.ndarray[Any, Any]

_BLOCK = 8


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes : array, shape (..., K), uint8
        Each below ``2**bits``.
    bits : int

    Returns
    -------
    array, shape (..., ceil(K * bits / 32)), uint32
        Spare bits at a row's end are zero.
    """
    *leading, count = codes.shape
    blocks = -(-count // _BLOCK)
    padded = np.zeros((*leading, blocks * _BLOCK), np.uint8)
    padded[..., :count] = codes
    padded = padded.reshape(*leading, blocks, _BLOCK)
    words = -(-count * bits // 32)
    target = np.zeros((*leading, blocks, bits), np.uint8)
    for position in range(_BLOCK):
        byte, shift = divmod(position * bits, 8)
        target[..., byte] |= padded[..., position] << shift
        if shift + bits > 8:
            target[..., byte + 1] |= padded[..., position] >> (8 - shift)
    stream = np.zeros((*leading, words * 4), np.uint8)
    used = min(words * 4, blocks * bits)
    stream[..., :used] = target.reshape(*leading, blocks * bits)[..., :used]
    return stream.view("<u4").astype(np.uint32, copy=False)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row.

    Parameters
    ----------
    packed : array, shape (..., W), uint32
    bits : int
    count : int
        At most ``W * 32 // bits``.

    Returns
    -------
    array, shape (..., count), uint8
    """
    leading = packed.shape[:-1]
    blocks = -(-count // _BLOCK)
    stream = np.ascontiguousarray(packed, dtype="<u4").view(np.uint8)
    if bits == 8:
        return stream[..., :count]
    if stream.shape[-1] < blocks * bits:
        stream = np.concatenate([stream, np.zeros((*leading, blocks * bits - stream.shape[-1]), np.uint8)], axis=-1)
    source = stream[..., : blocks * bits].reshape(*leading, blocks, bits)
    codes = np.empty((*leading, blocks, _BLOCK), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for position in range(_BLOCK):
        byte, shift = divmod(position * bits, 8)
        code = source[..., byte] >> shift
        if shift + bits > 8:
            code |= source[..., byte + 1] << (8 - shift)
        np.bitwise_and(code, mask, out=codes[..., position])
    return codes.reshape(*leading, blocks * _BLOCK)[..., :count]
