"""Packed weights from dense ones and dense from packed, a tile at a time, in array-API code."""

import math
from typing import Any, Final, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from quantcore import Scheme
from quantcore.dtypes import dtype_name, native_dtype
from quantcore_backends.array_api_backend import affine, microscaled
from quantcore_backends.array_api_backend.bitstream import constant, pack, unpack

__all__ = ["TILE", "decode", "decode_block", "encode", "tiles"]

Array = Any
Leaves: TypeAlias = tuple[Array, ...]

TILE: Final = 1 << 20
"""Elements that are dense at one time."""

_COLUMNS: Final = 8192


def tiles(rows: int, columns: int, stacked: int) -> tuple[int, int]:
    """Rows and columns of a tile of a stack of weights: at most about `TILE` elements, columns in whole groups."""
    width = min(columns, _COLUMNS)
    while width > 256 and width * stacked > TILE:
        width = -(-width // 512) * 256
    return max(1, min(rows, TILE // max(1, width * stacked))), width


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
    """Quantize along the last axis, by the rules of plugins.md where the library's arithmetic is IEEE's.

    Parameters
    ----------
    w : array, shape (..., N, K), real floating, finite
    scheme : Scheme

    Returns
    -------
    packed : array, shape scheme.packed_shape(w.shape), uint32
    scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
        Of the microscaled modes: uint8, and None.
    """
    xp = array_namespace(w)
    *leading, in_features = w.shape
    groups = scheme.groups(in_features)
    group = scheme.group_size or in_features
    if math.prod(leading) == 0:
        packed = xp.zeros(scheme.packed_shape(w.shape), dtype=xp.uint32)
        if not scheme.has_biases:
            return packed, xp.zeros(scheme.scales_shape(w.shape), dtype=xp.uint8), None
        return packed, w[..., :groups], w[..., :groups]
    dense = xp.astype(w, xp.float32)
    missing = groups * group - in_features
    if missing:
        last = xp.broadcast_to(dense[..., -1:], (*leading, missing))
        dense = xp.concat([dense, last], axis=-1)
    dense = xp.reshape(dense, (*leading, groups, group))
    codes, scale, bias = (
        affine.encode_groups(dense, scheme.bits) if scheme.has_biases else microscaled.encode_groups(dense, scheme.mode)
    )
    codes = xp.astype(codes, xp.int64 if xp.__name__.endswith("torch") else xp.uint32)
    codes = xp.reshape(codes, (*leading, groups * group))[..., :in_features]
    if bias is None:
        return pack(codes, scheme.bits), xp.astype(scale, xp.uint8), None
    native = native_dtype(dtype_name(w.dtype), w)  # w may be byte-swapped
    return pack(codes, scheme.bits), xp.astype(scale, native), xp.astype(bias, native)


def decode(leaves: Leaves, scheme: Scheme, in_features: int, dtype: str) -> Array:
    """Dense weight, computed in float32 and rounded once to `dtype`.

    Parameters
    ----------
    leaves : tuple of array, shape (..., *)
        packed, scales and, where the scheme has them, biases.
    scheme : Scheme
    in_features : int
    dtype : str
        Name of the result's dtype.

    Returns
    -------
    array, shape (..., in_features)
    """
    xp = array_namespace(leaves[0])
    leading = tuple(leaves[0].shape[:-1])
    count = math.prod(leading)
    wanted = native_dtype(dtype, leaves[0])
    if count == 0:
        return xp.zeros((*leading, in_features), dtype=wanted)
    flat = [xp.reshape(leaf, (count, leaf.shape[-1])) for leaf in leaves]
    step, _ = tiles(count, in_features, 1)
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block = decode_block(tuple(leaf[rows, :] for leaf in flat), scheme, 0, in_features)
        parts.append(xp.astype(block, wanted))
    dense = parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
    return xp.reshape(dense, (*leading, in_features))


def decode_block(leaves: Leaves, scheme: Scheme, start: int, stop: int, dtype: Any = None) -> Array:
    """Columns `start` to `stop` in float32, or in float64 if that is the dtype; `start` is a multiple of 256."""
    packed, *rest = leaves
    dtype = array_namespace(packed).float32 if dtype is None else dtype
    words = packed[..., start * scheme.bits // 32 : -(-stop * scheme.bits // 32)]
    codes = unpack(words, scheme.bits, stop - start)
    if scheme.has_biases:
        scales, biases = (_spread(leaf, scheme, start, stop) for leaf in rest)
        return affine.decode_codes(codes, scales, biases, dtype)
    return microscaled.decode_codes(codes, _spread(rest[0], scheme, start, stop), scheme.mode, dtype)


def _spread(of_groups: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """One scale or bias per column from `start` to `stop`; where the whole row is one group, one for all."""
    if scheme.group_size is None:
        return of_groups
    where = constant(np.arange(start, stop, dtype=np.int64) // scheme.group_size, of_groups)
    return array_namespace(of_groups).take(of_groups, where, axis=-1)
