"""Packed weights from dense ones and dense from packed, tile by tile; compiled where Numba is there."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from quantcore import Scheme
from quantcore.memory import aligned_empty
from quantcore_backends.cpu_kernels import affine, compiled, compiled_microscaled, encoded, microscaled
from quantcore_backends.cpu_kernels.bitstream import pack, unpack

__all__ = ["FLOAT32", "TILE", "Leaves", "column_step", "decode", "decode_block", "encode", "row_tiles"]

Array: TypeAlias = np.ndarray[Any, Any]
Leaves: TypeAlias = tuple[Array, ...]
"""packed, scales and, where the scheme has them, biases."""

FLOAT32 = np.dtype(np.float32)

TILE = 1 << 20
"""Elements that are dense at one time."""


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
    """Quantize along the last axis, by the rules of plugins.md.

    Parameters
    ----------
    w : array, shape (..., N, K), float16, bfloat16 or float32
    scheme : Scheme

    Returns
    -------
    packed : array, shape scheme.packed_shape(w.shape), uint32
    scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
        Not finite where the group isn't. Of the microscaled modes: uint8, and None.
    """
    in_features = w.shape[-1]
    rows = w.reshape(-1, in_features)
    native = w.dtype.newbyteorder("=")
    packed = aligned_empty((rows.shape[0], scheme.words(in_features)), np.uint32)
    if not scheme.has_biases:
        return _encode_microscaled(rows, packed, w.shape, scheme)
    per_group = rows.shape[0], scheme.groups(in_features)
    scales, biases = aligned_empty(per_group, native), aligned_empty(per_group, native)
    if rows.size and encoded.serves(native, scheme):
        source = compiled.rows_in_memory(rows, native)
        with np.errstate(over="ignore"):
            for leaf, exact in zip((scales, biases), encoded.encode_rows(source, scheme, packed), strict=True):
                leaf[...] = exact
        return _shaped(packed, scales, biases, w.shape, scheme)
    for part in row_tiles(rows.shape[0], in_features):
        with np.errstate(over="ignore", invalid="ignore"):
            groups = _in_groups(rows[part].astype(np.float32), scheme)
            codes, scale, bias = affine.encode_groups(groups, scheme.bits)
            scales[part], biases[part] = scale.astype(native), bias.astype(native)
        packed[part] = pack(codes.reshape(codes.shape[0], -1)[:, :in_features], scheme.bits)
    return _shaped(packed, scales, biases, w.shape, scheme)


def _shaped(
    packed: Array, scales: Array, biases: Array, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Array, Array, Array]:
    per_group = scheme.scales_shape(shape)
    return packed.reshape(scheme.packed_shape(shape)), scales.reshape(per_group), biases.reshape(per_group)


def _encode_microscaled(
    rows: Array, packed: Array, shape: tuple[int, ...], scheme: Scheme
) -> tuple[Array, Array, None]:
    in_features = rows.shape[1]
    scales = aligned_empty((rows.shape[0], scheme.groups(in_features)), np.uint8)
    for part in row_tiles(rows.shape[0], in_features):
        groups = _in_groups(rows[part].astype(np.float32), scheme)
        codes, scales[part] = microscaled.encode_groups(groups, scheme.mode)
        packed[part] = pack(codes.reshape(codes.shape[0], -1)[:, :in_features], scheme.bits)
    return packed.reshape(scheme.packed_shape(shape)), scales.reshape(scheme.scales_shape(shape)), None


def _in_groups(w: Array, scheme: Scheme) -> Array:
    """Rows as (N, G, group); a short last group is filled with its last element."""
    rows, in_features = w.shape
    groups = scheme.groups(in_features)
    group = scheme.group_size or in_features
    missing = groups * group - in_features
    if missing:
        w = np.concatenate([w, np.repeat(w[:, -1:], missing, axis=1)], axis=1)
    return w.reshape(rows, groups, group)


def decode(leaves: Leaves, scheme: Scheme, in_features: int, dtype: np.dtype[Any]) -> Array:
    """Dense weight, computed in float32 and rounded once to `dtype`.

    Parameters
    ----------
    leaves : tuple of array, shape (..., *)
        packed, scales and, where the scheme has them, biases.
    scheme : Scheme
    in_features : int
    dtype : numpy.dtype

    Returns
    -------
    array, shape (..., in_features)
    """
    leading = leaves[0].shape[:-1]
    flat = tuple(leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves)
    if dtype == FLOAT32 and compiled.available():
        return decode_block(flat, scheme, 0, in_features).reshape(*leading, in_features)
    dense = aligned_empty((flat[0].shape[0], in_features), dtype)
    width = column_step(in_features)
    for rows in row_tiles(flat[0].shape[0], min(width, in_features)):
        for start in range(0, in_features, width):
            stop = min(start + width, in_features)
            block = decode_block(tuple(leaf[rows] for leaf in flat), scheme, start, stop)
            with np.errstate(over="ignore"):
                dense[rows, start:stop] = block
    return dense.reshape(*leading, in_features)


def decode_block(leaves: Leaves, scheme: Scheme, start: int, stop: int, dtype: np.dtype[Any] = FLOAT32) -> Array:
    """Columns `start` to `stop` of rows, in float32 or float64; `start` is a multiple of `column_step`."""
    if dtype == FLOAT32 and compiled.available():
        if scheme.has_biases:
            return compiled.decode_block(*leaves, scheme, start, stop)
        return compiled_microscaled.decode_block(*leaves, scheme, start, stop)
    packed, *rest = leaves
    words = slice(start * scheme.bits // 32, -(-stop * scheme.bits // 32))
    codes = unpack(packed[:, words], scheme.bits, stop - start)
    dense = codes.astype(dtype) if scheme.has_biases else microscaled.elements(codes, scheme.mode, dtype)
    by = [leaf.astype(dtype) if scheme.has_biases else microscaled.scales(leaf, scheme.mode, dtype) for leaf in rest]
    group = scheme.group_size
    if group is None:
        return affine.scale(dense, *by)
    of_tile = [part[:, start // group : -(-stop // group)] for part in by]
    whole = (stop - start) // group * group
    affine.scale(
        dense[:, :whole].reshape(dense.shape[0], -1, group), *(part[:, : whole // group, None] for part in of_tile)
    )
    if whole < stop - start:
        affine.scale(dense[:, whole:], *(part[:, -1:] for part in of_tile))
    return dense


def column_step(in_features: int) -> int:
    """Columns of a tile: whole words and whole groups, of the row or of a part of it."""
    return min(-(-in_features // 256) * 256, 8192)


def row_tiles(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold at most about `TILE` elements each."""
    step = max(1, TILE // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
