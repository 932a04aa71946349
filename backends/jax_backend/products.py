"""Products of traced or distributed arrays, brought to the form of the primitive: some x, a stack, which with which."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantcore import QuantizedTensor
from quantcore_backends.jax_backend.partition import Product
from quantcore_backends.jax_backend.primitive import product

__all__ = ["check_indices", "dot", "gather_dot", "in_range", "nan_outside", "take"]

Array = Any


def dot(x: Array, qw: QuantizedTensor, dtype: np.dtype[Any], *, precision: str) -> Array:
    """``matmul(x, matrix_transpose(qw))``, accumulated in float32, or in float64 for a float64 x.

    Parameters
    ----------
    x : array, shape (..., M, C), or (C,) where `qw` has two axes
    qw : QuantizedTensor, shape (..., N, C)
    dtype : numpy.dtype
        Of the result.
    precision : {"highest", "default", "fast"}

    Returns
    -------
    array, shape (..., M, N), or (N,)
    """
    of, leaves = _plan(qw, precision), _leaves(qw)
    stack, out_features = qw.shape[:-2], qw.shape[-2]
    x = _working(x, dtype)
    if math.prod(stack) == 1:
        batch = np.broadcast_shapes(x.shape[:-2], stack) if stack else x.shape[:-2]
        rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
        made = product(rows, leaves, np.zeros(1, np.int32), of)
        return made.reshape(*batch, *x.shape[-2:-1], out_features).astype(dtype)
    batch = np.broadcast_shapes(x.shape[:-2], stack)
    which = np.broadcast_to(np.arange(math.prod(stack), dtype=np.int32).reshape(stack), batch).reshape(-1)
    spread = jnp.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(which.size, *x.shape[-2:])
    return product(spread, leaves, which, of).reshape(*batch, x.shape[-2], out_features).astype(dtype)


def gather_dot(x: Array, qw: QuantizedTensor, lhs: Array, rhs: Array, dtype: np.dtype[Any], *, precision: str) -> Array:
    """Products of matrix ``lhs[i]`` of x with weight ``rhs[i]`` of the stack; NaN where an index is out of range.

    Parameters
    ----------
    x : array, shape (..., M, C)
    qw : QuantizedTensor, shape (..., N, C)
    lhs, rhs : array of integers
        Flat indices; they broadcast.
    dtype : numpy.dtype
    precision : {"highest", "default", "fast"}

    Returns
    -------
    array, shape broadcast(lhs, rhs).shape + (M, N)
    """
    lhs, rhs = jnp.broadcast_arrays(lhs, rhs)
    matrices, weights = math.prod(x.shape[:-2]), math.prod(qw.shape[:-2])
    left, left_inside = in_range(lhs.reshape(-1), matrices)
    right, right_inside = in_range(rhs.reshape(-1), weights)
    flat = _working(x, dtype).reshape(matrices, *x.shape[-2:])
    made = product(take(flat, left, 0), _leaves(qw), right, _plan(qw, precision)).astype(dtype)
    made = nan_outside(made, left_inside & right_inside, 0)
    return made.reshape(*lhs.shape, x.shape[-2], qw.shape[-2])


def take(array: Array, places: Array, axis: int) -> Array:
    """``take`` of places that are in range; zeros where the axis is empty and none can be."""
    if array.shape[axis] == 0:
        return jnp.zeros((*array.shape[:axis], *places.shape, *array.shape[axis + 1 :]), array.dtype)
    return jnp.take(array, places, axis=axis, mode="clip")


def in_range(indices: Array, length: int) -> tuple[Array, Array]:
    """Indices from 0 to `length`, as int32, and which were in range to begin with."""
    indices = jnp.asarray(indices)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    inside = indices < length
    if jnp.issubdtype(indices.dtype, jnp.signedinteger):
        inside &= indices >= -length
        indices = jnp.where(indices < 0, indices + length, indices)
    return jnp.clip(indices, 0, max(length - 1, 0)).astype(jnp.int32), inside


def check_indices(indices: np.ndarray[Any, Any], length: int) -> None:
    """IndexError where an index is out of range."""
    if indices.size and not (-length <= int(indices.min()) and int(indices.max()) < length):
        raise IndexError(f"indices from {indices.min()} to {indices.max()} are out of range for length {length}")


def nan_outside(made: Array, inside: Array, axis: int) -> Array:
    """The array with NaN where an index, which stands along `axis`, was out of range."""
    where = inside.reshape(*(1,) * axis, *inside.shape, *(1,) * (made.ndim - axis - inside.ndim))
    return jnp.where(where, made, jnp.asarray(np.nan, made.dtype))


def _plan(qw: QuantizedTensor, precision: str) -> Product:
    return Product(qw.scheme, qw.in_features, qw.transposed, precision)


def _leaves(qw: QuantizedTensor) -> tuple[Array, ...]:
    """packed, scales, biases with the leading axes made one, and of dtypes that the kernels read."""
    scales, biases = qw.scales, qw.biases
    if scales.dtype != biases.dtype or scales.dtype.name not in ("float32", "float16", "bfloat16"):
        scales, biases = scales.astype(np.float32), biases.astype(np.float32)
    stacked = math.prod(qw.packed.shape[:-2])
    return tuple(leaf.reshape(stacked, *leaf.shape[-2:]) for leaf in (qw.packed, scales, biases))


def _working(x: Array, dtype: np.dtype[Any]) -> Array:
    return x.astype(np.float64 if np.float64 in (x.dtype, dtype) else np.float32)
