"""Affine codes from weights and weights from affine codes, tile by tile; compiled where Numba is there."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from quantcore import Scheme
from quantcore_backends.cpu_kernels import compiled, encoded
from quantcore_backends.cpu_kernels.bitstream import pack, unpack

__all__ = ["TILE", "decode", "decode_block", "encode"]

Array: TypeAlias = np.ndarray[Any, Any]

FLOAT32 = np.dtype(np.float32)

TILE = 1 << 20
"""Elements that are dense at one time."""


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Quantize along the last axis, bit-equal to the CPU kernel of MLX 0.32.

    Parameters
    ----------
    w : array, shape (..., N, K), float16, bfloat16 or float32
    scheme : Scheme

    Returns
    -------
    packed : array, shape scheme.packed_shape(w.shape), uint32
    scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
        Not finite where the group isn't.
    """
    in_features = w.shape[-1]
    rows = w.reshape(-1, in_features)
    native = w.dtype.newbyteorder("=")
    packed = np.empty((rows.shape[0], scheme.words(in_features)), np.uint32)
    scales = np.empty((rows.shape[0], scheme.groups(in_features)), native)
    biases = np.empty_like(scales)
    if rows.size and encoded.serves(native, scheme):
        source = compiled.rows_in_memory(rows, native)
        with np.errstate(over="ignore"):
            for leaf, exact in zip((scales, biases), encoded.encode_rows(source, scheme, packed), strict=True):
                leaf[...] = exact
        return _shaped(packed, scales, biases, w.shape, scheme)
    for part in row_tiles(rows.shape[0], in_features):
        with np.errstate(over="ignore", invalid="ignore"):
            codes, scale, bias = _encode_rows(rows[part].astype(np.float32), scheme)
            scales[part], biases[part] = scale.astype(native), bias.astype(native)
        packed[part] = pack(codes, scheme.bits)
    return _shaped(packed, scales, biases, w.shape, scheme)


def _shaped(
    packed: Array, scales: Array, biases: Array, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Array, Array, Array]:
    per_group = scheme.scales_shape(shape)
    return packed.reshape(scheme.packed_shape(shape)), scales.reshape(per_group), biases.reshape(per_group)


def _encode_rows(w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Codes, scales and biases of rows in float32; a short last group is filled with its last element."""
    rows, in_features = w.shape
    groups = scheme.groups(in_features)
    group = scheme.group_size or in_features
    missing = groups * group - in_features
    if missing:
        w = np.concatenate([w, np.repeat(w[:, -1:], missing, axis=1)], axis=1)
    w = w.reshape(rows, groups, group)
    low, high = w.min(axis=-1, keepdims=True), w.max(axis=-1, keepdims=True)
    top = np.float32((1 << scheme.bits) - 1)
    scale, bias = _scale_and_bias(low, high, top)
    codes = np.clip(np.rint((w - bias) / scale), 0, top).astype(np.uint8)
    return codes.reshape(rows, groups * group)[:, :in_features], scale[..., 0], bias[..., 0]


def _scale_and_bias(low: Array, high: Array, top: np.float32) -> tuple[Array, Array]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    if top == 1:
        return scale, low  # one bit: the two ends
    from_low = np.abs(low) > np.abs(high)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    steps = np.rint(edge / scale)
    moved = steps != 0
    return np.divide(edge, steps, out=scale, where=moved), np.where(moved, edge, np.float32(0))


def decode(
    packed: Array, scales: Array, biases: Array, scheme: Scheme, in_features: int, dtype: np.dtype[Any]
) -> Array:
    """Dense weight, ``code * scale + bias`` in float32, rounded once to `dtype`.

    Parameters
    ----------
    packed, scales, biases : array, shape (..., *)
    scheme : Scheme
    in_features : int
    dtype : numpy.dtype

    Returns
    -------
    array, shape (..., in_features)
    """
    leading = packed.shape[:-1]
    packed, scales, biases = (part.reshape(-1, part.shape[-1]) for part in (packed, scales, biases))
    if dtype == FLOAT32 and compiled.available():
        dense = compiled.decode_block(packed, scales, biases, scheme, 0, in_features)
        return dense.reshape(*leading, in_features)
    dense = np.empty((packed.shape[0], in_features), dtype)
    width = column_step(scheme, in_features)
    for rows in row_tiles(packed.shape[0], min(width, in_features)):
        for start in range(0, in_features, width):
            stop = min(start + width, in_features)
            block = decode_block(packed[rows], scales[rows], biases[rows], scheme, start, stop)
            with np.errstate(over="ignore"):
                dense[rows, start:stop] = block
    return dense.reshape(*leading, in_features)


def decode_block(
    packed: Array,
    scales: Array,
    biases: Array,
    scheme: Scheme,
    start: int,
    stop: int,
    dtype: np.dtype[Any] = FLOAT32,
) -> Array:
    """Columns `start` to `stop` of rows, in float32 or float64; `start` is a multiple of `column_step`."""
    if dtype == FLOAT32 and compiled.available():
        return compiled.decode_block(packed, scales, biases, scheme, start, stop)
    words = slice(start * scheme.bits // 32, -(-stop * scheme.bits // 32))
    codes = unpack(packed[:, words], scheme.bits, stop - start)
    dense = codes.astype(dtype)
    group = scheme.group_size
    if group is None:
        spread = (scales.astype(dtype), biases.astype(dtype))
        return _affine(dense, *spread)
    groups = slice(start // group, -(-stop // group))
    scale, bias = scales[:, groups].astype(dtype), biases[:, groups].astype(dtype)
    whole = (stop - start) // group * group
    _affine(
        dense[:, :whole].reshape(dense.shape[0], -1, group),
        scale[:, : whole // group, None],
        bias[:, : whole // group, None],
    )
    if whole < stop - start:
        _affine(dense[:, whole:], scale[:, -1:], bias[:, -1:])
    return dense


def _affine(codes: Array, scale: Array, bias: Array) -> Array:
    """In place: the product, then the sum, each rounded, as the contract has it."""
    with np.errstate(over="ignore", invalid="ignore"):
        codes *= scale
        codes += bias
    return codes


def column_step(scheme: Scheme, in_features: int) -> int:
    """Columns of a tile: whole words and whole groups, or the row where it is shorter."""
    return min(-(-in_features // 256) * 256, 8192)


def row_tiles(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold at most about `TILE` elements each."""
    step = max(1, TILE // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
