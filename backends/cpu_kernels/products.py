"""Products with packed weights in NumPy: by compiled kernels, where there is one that serves.

Else the weight is dense one tile at a time, and BLAS does the rest. Peak memory beyond the result and one float copy
of x stays under 64 MiB whatever the weight's size.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from quantcore import QuantizedTensor
from quantcore.memory import aligned_empty, is_frozen
from quantcore_backends.cpu_kernels import compiled, compiled_microscaled, integer
from quantcore_backends.cpu_kernels.likeness import independent_rows
from quantcore_backends.cpu_kernels.weights import FLOAT32, TILE, Leaves, column_step, decode_block
from quantcore_backends.cpu_kernels.zero_points import common_zero_point

__all__ = ["dot", "gather_dot", "multiply"]

Array: TypeAlias = np.ndarray[Any, Any]

_FLOAT64 = np.dtype(np.float64)
_SMALL = 1 << 12
"""Elements of a result whose memory is had sooner than a cache line is found in it."""
_ROWS_OF_X = 2048
_SIDE = 1024
"""With `_ROWS_OF_X`, what bounds a partial product: 8 MiB in float32."""


def dot(x: Array, qw: QuantizedTensor, dtype: np.dtype[Any], precision: str = "default") -> Array:
    """``matmul(x, matrix_transpose(qw))``, accumulated in float32, or float64 for a float64 x.

    Where Numba is there, x becomes integers of 16 bits, or 8 with "fast", a scale for each 64 at most; 24 with
    "highest", for few rows: many stay floats. More bits follow, then floats, where integers would lose more of x than
    the precision allows.

    Parameters
    ----------
    x : array, shape (..., M, K), or (K,) where `qw` has two axes
    qw : QuantizedTensor, shape (..., N, K)
    dtype : numpy.dtype
        Of the result.
    precision : {"highest", "default", "fast"}
        With "highest" the error stays below 1e-12 whatever x is. Where a whole row is one group, its weights are of
        few values whose roundings to float32 add up if x has an offset: then the product is in float64.

    Returns
    -------
    array, shape (..., M, N), or (N,)
    """
    weight = _weight(qw) if x.dtype == FLOAT32 and dtype != _FLOAT64 and x.size else None
    if weight is not None:
        product = _rounded_product(x, weight, dtype, precision)
        if product is not None:
            return product
    plan = _Plan.of(x, qw, dtype, precision, tried=weight is not None)
    out_features, contracted = qw.shape[-2:]
    stack = qw.shape[:-2]
    if math.prod(stack) == 1:
        batch = np.broadcast_shapes(x.shape[:-2], stack) if stack else x.shape[:-1]
        rows = np.ascontiguousarray(x, plan.work).reshape(math.prod(x.shape[:-1]), contracted)
        result = _matrix(rows, _leaves(qw, 1), plan)
        return result.reshape((*batch, x.shape[-2], out_features) if stack else (*batch, out_features))
    return _stacked(np.asarray(x, plan.work), plan)


def _rounded_product(x: Array, weight: integer.Weight, dtype: np.dtype[Any], precision: str) -> Array | None:
    """The usual case, kept short: one matrix, and x in float32 that integers serve. None where they don't."""
    rows = np.ascontiguousarray(x)
    if x.ndim != 2:
        rows = rows.reshape(-1, x.shape[-1])
    product = _integer_product(rows, weight, precision)
    if product is None:
        return None
    if dtype != FLOAT32:
        with np.errstate(over="ignore"):
            product = product.astype(dtype)
    return product if x.ndim == 2 else product.reshape(*x.shape[:-1], product.shape[1])


def _integer_product(x: Array, weight: integer.Weight, precision: str) -> Array | None:
    """The product with x made integers; None where these don't serve."""
    rows, outputs = x.shape[0], weight.geometry.rows
    new = aligned_empty if rows * outputs > _SMALL else np.empty
    out = new((rows, outputs), FLOAT32)
    return out if not out.size or multiply(x, rows, weight, out, precision) else None


def multiply(x: Array | int, rows: int, weight: integer.Weight, out: Array | int, precision: str) -> bool:
    """``out = x @ w.T`` by the first kernel that serves: integers of few bits, of more, floats; whether any does.

    Parameters
    ----------
    x, out : array or int
        Arrays of shape (M, K) and (M, N), float32, C-contiguous, or both their addresses.
    rows : int
        M, not 0.
    weight : Weight, shape (N, K)
    precision : {"highest", "default", "fast"}
    """
    for width in weight.widths[precision][rows > integer.UNTILED_ROWS]:
        if integer.multiply(x, rows, weight, out, width):
            return True
    return False


def _stacked(x: Array, plan: "_Plan") -> Array:
    qw, dtype = plan.qw, plan.dtype
    stack, (out_features, contracted) = qw.shape[:-2], qw.shape[-2:]
    batch = np.broadcast_shapes(x.shape[:-2], stack)
    rows = x.shape[-2]
    result = np.empty((*batch, rows, out_features), dtype)
    x = np.broadcast_to(x, (*batch, rows, contracted))
    which = np.broadcast_to(np.arange(math.prod(stack)).reshape(stack), batch)
    leaves = _leaves(qw, math.prod(stack))
    for position in np.ndindex(batch):
        chosen = tuple(leaf[which[position]] for leaf in leaves)
        result[position] = _matrix(np.ascontiguousarray(x[position]), chosen, plan)
    return result


def gather_dot(
    x: Array, qw: QuantizedTensor, lhs: Array, rhs: Array, dtype: np.dtype[Any], precision: str = "default"
) -> Array:
    """Products of matrix ``lhs[i]`` of x with weight ``rhs[i]`` of the stack, each weight unpacked once.

    Parameters
    ----------
    x : array, shape (..., M, K)
    qw : QuantizedTensor, shape (..., N, K)
    lhs, rhs : array of integers
        Flat indices; they broadcast.
    dtype : numpy.dtype
    precision : {"highest", "default", "fast"}
        As in :func:`dot`.

    Returns
    -------
    array, shape broadcast(lhs, rhs).shape + (M, N)
    """
    plan = _Plan.of(x, qw, dtype, precision)
    out_features, contracted = qw.shape[-2:]
    rows = x.shape[-2]
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    matrices, weights = math.prod(x.shape[:-2]), math.prod(qw.shape[:-2])
    left = checked_indices(lhs.reshape(-1), matrices)
    right = checked_indices(rhs.reshape(-1), weights)
    flat = x.reshape(matrices, rows, contracted)
    leaves = tuple(leaf.reshape(weights, *leaf.shape[-2:]) for leaf in qw.flatten()[0])
    result = np.empty((left.size, rows, out_features), dtype)
    for weight in np.unique(right):
        places = np.flatnonzero(right == weight)
        operand = np.ascontiguousarray(flat[left[places]], plan.work).reshape(places.size * rows, contracted)
        chosen = tuple(leaf[weight] for leaf in leaves)
        product = _matrix(operand, chosen, plan)
        result[places] = product.reshape(places.size, rows, out_features)
    return result.reshape(*lhs.shape, rows, out_features)


def checked_indices(indices: Array, length: int) -> Array:
    """Non-negative indices; IndexError where one is out of range."""
    if indices.size and not (-length <= int(indices.min()) and int(indices.max()) < length):
        raise IndexError(f"indices from {indices.min()} to {indices.max()} are out of range for length {length}")
    indices = indices.astype(np.intp)
    return np.where(indices < 0, indices + length, indices)


def _leaves(qw: QuantizedTensor, stacked: int) -> Leaves:
    """The weight's arrays with the leading axes made one, or none where there is one weight."""
    leaves = qw.flatten()[0]
    if qw.ndim == 2:
        return leaves
    shape = () if stacked == 1 else (stacked,)
    return tuple(leaf.reshape(*shape, *leaf.shape[-2:]) for leaf in leaves)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A product's weight, the dtypes of its result, its sums and its tiles of the weight; whether to try integers."""

    qw: QuantizedTensor
    dtype: np.dtype[Any]
    work: np.dtype[Any]
    tile: np.dtype[Any]
    precision: str
    integers: bool

    @classmethod
    def of(cls, x: Array, qw: QuantizedTensor, dtype: np.dtype[Any], precision: str, *, tried: bool = False) -> "_Plan":
        """That of a product for which integers were `tried` in vain, or not yet."""
        unrounded = precision == "highest" and qw.scheme.group_size is None
        wide = unrounded or np.float64 in (x.dtype, dtype)
        integers = not (tried or wide or qw.transposed) and integer.serves(qw.scheme)
        tile = _FLOAT64 if unrounded else FLOAT32
        return cls(qw, dtype, np.dtype(np.float64 if wide else np.float32), tile, precision, integers)


def _matrix(x: Array, leaves: Leaves, plan: _Plan) -> Array:
    qw, dtype = plan.qw, plan.dtype
    product = _compiled_product(x, leaves, plan)
    if product is not None:
        with np.errstate(over="ignore"):
            return product.astype(dtype, order="C", copy=False)
    result = np.empty((x.shape[0], qw.shape[-2]), dtype)
    along = _against_rows if qw.transposed else _against_groups
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.shape[0], _ROWS_OF_X):
            part = slice(start, start + _ROWS_OF_X)
            along(x[part], leaves, plan, result[part])
    return result


def _compiled_product(x: Array, leaves: Leaves, plan: _Plan) -> Array | None:
    """The product by a compiled kernel, where there is one, and its result is finite: it gives NaN for infinities."""
    qw = plan.qw
    if plan.integers and x.size:
        weight = _weight(qw) if leaves[0] is qw.packed else None
        weight = weight or integer.Weight.of(*leaves, qw.scheme, qw.in_features)
        product = _integer_product(x, weight, plan.precision)
        if product is not None:
            return product
    product = _product_of_few(x, leaves, qw)
    return product if product is not None and np.isfinite(product).all() else None


def _product_of_few(x: Array, leaves: Leaves, qw: QuantizedTensor) -> Array | None:
    """That of few rows of x in float32, codes unpacked in registers; None where there is no kernel for it."""
    scheme = qw.scheme
    few = 0 < x.shape[0] <= compiled.FEW_ROWS and x.size and x.dtype == FLOAT32
    if not (few and compiled.available()) or (qw.transposed and not scheme.has_biases):
        return None
    if qw.transposed:
        return compiled.few_rows_along(x, *leaves, scheme, qw.in_features)
    few_rows = compiled.few_rows if scheme.has_biases else compiled_microscaled.few_rows
    return few_rows(x, *leaves, scheme)


_weights: dict[int, tuple[weakref.ref[QuantizedTensor], integer.Weight]] = {}
_looked_at: weakref.WeakKeyDictionary[QuantizedTensor, int] = weakref.WeakKeyDictionary()
"""How many of a tensor's rows count as independent: looked at once, also where its weight is made anew each time."""


def _weight(qw: QuantizedTensor) -> integer.Weight | None:
    """A matrix as the kernels on integers take it; None where they don't.

    It is kept as long as the tensor, unless it holds a copy that would cost memory, or that writing to the tensor's
    arrays would leave behind.
    """
    key = id(qw)
    found = _weights.get(key)
    if found is not None and found[0]() is qw:
        return found[1]
    if qw.packed.ndim != 2 or qw.transposed or not integer.serves(qw.scheme):
        return None
    lasting = is_frozen(qw.scales) and is_frozen(qw.biases)  # else they might be changed in place
    zero_point = common_zero_point(qw.scales, qw.biases) if lasting else 0
    leaves = qw.flatten()[0]
    independent = _looked_at.get(qw)
    if independent is None:
        independent = _looked_at[qw] = independent_rows(*leaves, qw.scheme, qw.in_features)
    weight = integer.Weight.of(*leaves, qw.scheme, qw.in_features, zero_point, independent)
    packed, *per_group = (leaf.ctypes.data for leaf in leaves)
    if weight.addresses[0] == packed and (lasting or weight.addresses[1:] == tuple(per_group)):
        _weights[key] = weakref.ref(qw, lambda _: _weights.pop(key, None)), weight
    return weight


def _against_groups(x: Array, leaves: Leaves, plan: _Plan, out: Array) -> None:
    """Out = x @ w.T, contracted along the grouped axis."""
    scheme, in_features = plan.qw.scheme, plan.qw.in_features
    width = column_step(in_features)
    for rows in _tiles(leaves[0].shape[0], width):
        total: Array | None = None
        for start in range(0, in_features, width):
            stop = min(start + width, in_features)
            tile = decode_block(tuple(leaf[rows] for leaf in leaves), scheme, start, stop, plan.tile)
            part = x[:, start:stop] @ tile.T.astype(x.dtype, copy=False)
            total = part if total is None else np.add(total, part, out=total)
        out[:, rows] = total


def _against_rows(x: Array, leaves: Leaves, plan: _Plan, out: Array) -> None:
    """Out = x @ w, contracted along the rows of w."""
    scheme, in_features = plan.qw.scheme, plan.qw.in_features
    width = min(column_step(in_features), _SIDE)
    for start in range(0, in_features, width):
        stop = min(start + width, in_features)
        total = np.zeros((x.shape[0], stop - start), x.dtype)
        for rows in _tiles(leaves[0].shape[0], width):
            tile = decode_block(tuple(leaf[rows] for leaf in leaves), scheme, start, stop, plan.tile)
            total += x[:, rows] @ tile.astype(x.dtype, copy=False)
        out[:, start:stop] = total


def _tiles(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose tiles, and whose partial products with `_ROWS_OF_X` rows of x, stay small."""
    step = max(1, min(_SIDE, TILE // max(width, 1)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
