"""Products with packed weights in array-API code: the weight is dense one tile at a time."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from array_api_compat import array_namespace

from quantcore import QuantizedTensor
from quantcore.dtypes import dtype_name, native_dtype
from quantcore_backends.array_api_backend.matmul import matmul
from quantcore_backends.array_api_backend.weights import decode_block, tiles

__all__ = ["dot"]

Array = Any

_EXACT_LENGTH: Final = 512
"""Longest float32 sum left to the library where the error must stay below 1e-12: MLX's own matmul misses it at 4096."""


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
    plan = _Plan.of(x, qw, dtype, exact)
    operand = xp.astype(x, plan.work)
    if len(x.shape) == 1:
        return xp.reshape(_product(operand[None, :], plan), (qw.shape[-2],))
    return _product(operand, plan)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A product's weight, the dtypes of its result, sums and tiles, and how long a sum the library may make."""

    qw: QuantizedTensor
    dtype: Any
    work: Any
    tile: Any
    longest: int | None

    @classmethod
    def of(cls, x: Array, qw: QuantizedTensor, dtype: str, exact: bool) -> "_Plan":
        unrounded = exact and qw.scheme.group_size is None
        wide = unrounded or "float64" in (dtype, dtype_name(x.dtype))
        return cls(
            qw,
            native_dtype(dtype, x),
            native_dtype("float64" if wide else "float32", x),
            native_dtype("float64" if unrounded else "float32", x),
            _EXACT_LENGTH if exact and not wide else None,
        )

    def tiles(self) -> tuple[int, int]:
        """Rows and columns of a tile of the stored weight."""
        qw = self.qw
        height, width = tiles(qw.packed.shape[-2], qw.in_features, math.prod(qw.packed.shape[:-2]))
        if self.longest is None:
            return height, width
        return (min(height, self.longest), width) if qw.transposed else (height, min(width, self.longest))


def _product(x: Array, plan: _Plan) -> Array:
    xp, qw = array_namespace(x), plan.qw
    batch = np.broadcast_shapes(tuple(x.shape[:-2]), qw.shape[:-2])
    shape = (*batch, x.shape[-2], qw.shape[-2])
    if math.prod(shape) == 0 or x.shape[-1] == 0:
        return xp.zeros(shape, dtype=plan.dtype)
    parts = _along_rows(x, plan) if qw.transposed else _along_groups(x, plan)
    parts = [xp.astype(part, plan.dtype) for part in parts]
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)


def _along_groups(x: Array, plan: _Plan) -> list[Array]:
    """Column blocks of x @ w.T, contracted along the grouped axis."""
    xp, qw = array_namespace(x), plan.qw
    rows = qw.packed.shape[-2]
    height, width = plan.tiles()
    blocks = []
    for top in range(0, rows, height):
        leaves = tuple(leaf[..., top : min(top + height, rows), :] for leaf in qw.flatten()[0])
        total = None
        for start in range(0, qw.in_features, width):
            stop = min(start + width, qw.in_features)
            tile = xp.astype(decode_block(leaves, qw.scheme, start, stop, plan.tile), x.dtype)
            part = matmul(x[..., start:stop], xp.matrix_transpose(tile))
            total = part if total is None else total + part
        blocks.append(total)
    return blocks


def _along_rows(x: Array, plan: _Plan) -> list[Array]:
    """Column blocks of x @ w, contracted along the rows of w."""
    xp, qw = array_namespace(x), plan.qw
    rows = qw.packed.shape[-2]
    height, width = plan.tiles()
    blocks = []
    for start in range(0, qw.in_features, width):
        stop = min(start + width, qw.in_features)
        total = None
        for top in range(0, rows, height):
            here = slice(top, min(top + height, rows))
            leaves = tuple(leaf[..., here, :] for leaf in qw.flatten()[0])
            tile = xp.astype(decode_block(leaves, qw.scheme, start, stop, plan.tile), x.dtype)
            part = matmul(x[..., here], tile)
            total = part if total is None else total + part
        blocks.append(total)
    return blocks
