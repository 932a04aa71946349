"""Products with packed weights in array-API code: the weight is dense one tile at a time."""

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from quantcore import QuantizedTensor
from quantcore.dtypes import dtype_name, native_dtype
from quantcore_backends.array_api_backend.affine import decode_block, tiles

__all__ = ["dot"]

Array = Any


def dot(x: Array, qw: QuantizedTensor, dtype: str, *, exact: bool = False) -> Array:
    """``matmul(x, matrix_transpose(qw))``, accumulated in float32, or float64 for a float64 x.

    Parameters
    ----------
    x : array, shape (..., M, K), or (K,) where `qw` has two axes
    qw : QuantizedTensor, shape (..., N, K)
    dtype : str
        Name of the result's dtype.
    exact : bool
        Whether the error must stay below 1e-12 whatever x is. Where a whole row is one group, its weights are of few
        values whose roundings to float32 add up if x has an offset: then the product is in float64.

    Returns
    -------
    array, shape (..., M, N), or (N,)
    """
    xp = array_namespace(x)
    unrounded = exact and qw.scheme.group_size is None
    wide = unrounded or "float64" in (dtype, dtype_name(x.dtype))
    operand = xp.astype(x, native_dtype("float64" if wide else "float32", x))
    tile = native_dtype("float64" if unrounded else "float32", x)
    if len(x.shape) == 1:
        return xp.reshape(_product(operand[None, :], qw, dtype, tile), (qw.shape[-2],))
    return _product(operand, qw, dtype, tile)


def _product(x: Array, qw: QuantizedTensor, dtype: str, tile_dtype: Any) -> Array:
    xp = array_namespace(x)
    wanted = native_dtype(dtype, x)
    batch = np.broadcast_shapes(tuple(x.shape[:-2]), qw.shape[:-2])
    shape = (*batch, x.shape[-2], qw.shape[-2])
    if math.prod(shape) == 0 or x.shape[-1] == 0:
        return xp.zeros(shape, dtype=wanted)
    parts = _along_rows(x, qw, tile_dtype) if qw.transposed else _along_groups(x, qw, tile_dtype)
    parts = [xp.astype(part, wanted) for part in parts]
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)


def _along_groups(x: Array, qw: QuantizedTensor, tile_dtype: Any) -> list[Array]:
    """Column blocks of x @ w.T, contracted along the grouped axis."""
    xp = array_namespace(x)
    rows = qw.packed.shape[-2]
    height, width = tiles(rows, qw.in_features, math.prod(qw.packed.shape[:-2]))
    blocks = []
    for top in range(0, rows, height):
        leaves = [leaf[..., top : min(top + height, rows), :] for leaf in (qw.packed, qw.scales, qw.biases)]
        total = None
        for start in range(0, qw.in_features, width):
            stop = min(start + width, qw.in_features)
            tile = xp.astype(decode_block(*leaves, qw.scheme, start, stop, tile_dtype), x.dtype)
            part = xp.matmul(x[..., start:stop], xp.matrix_transpose(tile))
            total = part if total is None else total + part
        blocks.append(total)
    return blocks


def _along_rows(x: Array, qw: QuantizedTensor, tile_dtype: Any) -> list[Array]:
    """Column blocks of x @ w, contracted along the rows of w."""
    xp = array_namespace(x)
    rows = qw.packed.shape[-2]
    height, width = tiles(rows, qw.in_features, math.prod(qw.packed.shape[:-2]))
    blocks = []
    for start in range(0, qw.in_features, width):
        stop = min(start + width, qw.in_features)
        total = None
        for top in range(0, rows, height):
            here = slice(top, min(top + height, rows))
            leaves = [leaf[..., here, :] for leaf in (qw.packed, qw.scales, qw.biases)]
            tile = xp.astype(decode_block(*leaves, qw.scheme, start, stop, tile_dtype), x.dtype)
            part = xp.matmul(x[..., here], tile)
            total = part if total is None else total + part
        blocks.append(total)
    return blocks
