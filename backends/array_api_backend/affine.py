"""Affine codes from weights and weights from affine codes, in array-API code."""

import math
from typing import Any, Final

import numpy as np
from array_api_compat import array_namespace

from quantcore import Scheme
from quantcore.dtypes import dtype_name, native_dtype
from quantcore_backends.array_api_backend.bitstream import constant, pack, unpack

__all__ = ["TILE", "decode", "decode_block", "encode", "tiles"]

Array = Any

TILE: Final = 1 << 20
"""Elements that are dense at one time."""

_COLUMNS: Final = 8192


def tiles(rows: int, columns: int, stacked: int) -> tuple[int, int]:
    """Rows and columns of a tile of a stack of weights: at most about `TILE` elements, columns in whole groups."""
    width = min(columns, _COLUMNS)
    while width > 256 and width * stacked > TILE:
        width = -(-width // 512) * 256
    return max(1, min(rows, TILE // max(1, width * stacked))), width


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Quantize along the last axis, bit-equal to the CPU kernel of MLX 0.32 where the library's arithmetic is IEEE's.

    Parameters
    ----------
    w : array, shape (..., N, K), real floating, finite
    scheme : Scheme

    Returns
    -------
    packed : array, shape scheme.packed_shape(w.shape), uint32
    scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
    """
    xp = array_namespace(w)
    *leading, in_features = w.shape
    groups = scheme.groups(in_features)
    group = scheme.group_size or in_features
    if math.prod(leading) == 0:
        packed = xp.zeros(scheme.packed_shape(w.shape), dtype=xp.uint32)
        return packed, w[..., :groups], w[..., :groups]
    dense = xp.astype(w, xp.float32)
    missing = groups * group - in_features
    if missing:
        last = xp.broadcast_to(dense[..., -1:], (*leading, missing))
        dense = xp.concat([dense, last], axis=-1)
    dense = xp.reshape(dense, (*leading, groups, group))
    codes, scale, bias = _encode_groups(dense, scheme.bits)
    codes = xp.reshape(codes, (*leading, groups * group))[..., :in_features]
    native = native_dtype(dtype_name(w.dtype), w)  # w may be byte-swapped
    return pack(codes, scheme.bits), xp.astype(scale, native), xp.astype(bias, native)


def _encode_groups(w: Array, bits: int) -> tuple[Array, Array, Array]:
    xp = array_namespace(w)
    top = float((1 << bits) - 1)
    scale, bias = _scale_and_bias(xp.min(w, axis=-1, keepdims=True), xp.max(w, axis=-1, keepdims=True), top)
    codes = xp.clip(xp.round((w - bias) / scale), 0.0, top)
    integer = xp.int64 if xp.__name__.endswith("torch") else xp.uint32
    return xp.astype(codes, integer), scale[..., 0], bias[..., 0]


def _scale_and_bias(low: Array, high: Array, top: float) -> tuple[Array, Array]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    xp = array_namespace(low)
    smallest = constant(np.asarray([1e-7], np.float32), low)
    scale = (high - low) / top
    scale = xp.where(scale > smallest, scale, smallest)
    if top == 1:
        return scale, low  # one bit: the two ends
    from_low = xp.abs(low) > xp.abs(high)
    scale = xp.where(from_low, scale, -scale)
    edge = xp.where(from_low, low, high)
    steps = xp.round(edge / scale)
    moved = steps != 0
    scale = xp.where(moved, edge / xp.where(moved, steps, xp.ones_like(steps)), scale)
    return scale, xp.where(moved, edge, xp.zeros_like(edge))


def decode(packed: Array, scales: Array, biases: Array, scheme: Scheme, in_features: int, dtype: str) -> Array:
    """Dense weight, ``code * scale + bias`` in float32, rounded once to `dtype`.

    Parameters
    ----------
    packed, scales, biases : array, shape (..., *)
    scheme : Scheme
    in_features : int
    dtype : str
        Name of the result's dtype.

    Returns
    -------
    array, shape (..., in_features)
    """
    xp = array_namespace(packed)
    leading = tuple(packed.shape[:-1])
    count = math.prod(leading)
    wanted = native_dtype(dtype, scales)
    if count == 0:
        return xp.zeros((*leading, in_features), dtype=wanted)
    codes, scale, bias = (xp.reshape(part, (count, part.shape[-1])) for part in (packed, scales, biases))
    step, _ = tiles(count, in_features, 1)
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block = decode_block(codes[rows, :], scale[rows, :], bias[rows, :], scheme, 0, in_features)
        parts.append(xp.astype(block, wanted))
    dense = parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
    return xp.reshape(dense, (*leading, in_features))


def decode_block(
    packed: Array, scales: Array, biases: Array, scheme: Scheme, start: int, stop: int, dtype: Any = None
) -> Array:
    """Columns `start` to `stop` in float32, or in float64 if that is the dtype; `start` is a multiple of 256."""
    xp = array_namespace(packed)
    dtype = xp.float32 if dtype is None else dtype
    words = packed[..., start * scheme.bits // 32 : -(-stop * scheme.bits // 32)]
    codes = xp.astype(unpack(words, scheme.bits, stop - start), dtype)
    scale, bias = xp.astype(scales, dtype), xp.astype(biases, dtype)
    if scheme.group_size is not None:
        where = constant(np.arange(start, stop, dtype=np.int64) // scheme.group_size, packed)
        scale, bias = xp.take(scale, where, axis=-1), xp.take(bias, where, axis=-1)
    return codes * scale + bias
