"""Products in tiles: some rows of the weight are dense at a time, and XLA's own dot does the rest.

This is the product on GPUs and TPUs, on the CPU of more rows of x than a kernel takes (see :mod:`routes`), and wherever
the compiled targets can't be used. A loop of XLA's goes over the tiles, so that no more than `TILE` elements of the
weight are ever dense.
"""

from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from jax import lax

from quantcore import Scheme
from quantcore_backends.jax_backend import codes

__all__ = ["TILE", "product"]

Array = Any

TILE: Final = 1 << 20
"""Elements of the weight that are dense at one time."""

_EXACT_LENGTH: Final = 1024
"""Longest float32 sum of XLA's that keeps to 1e-12, whatever it accumulates in."""

Decode = Callable[[tuple[Array, ...], Array, Array, int], Array]
"""(leaves, weight, first row, rows) → rows of one weight of a stack, dense in float32."""


def product(
    x: Array,
    leaves: tuple[Array, Array, Array],
    which: Array,
    scheme: Scheme,
    columns: int,
    *,
    along_rows: bool,
    precision: str,
    decode: Decode | None = None,
) -> Array:
    """Products of matrices of x with chosen weights of a stack.

    Parameters
    ----------
    x : array, shape (P, M, C), float32 or float64
    leaves : tuple of array, shape (E, N, *)
        packed, scales and biases.
    which : array, shape (P,), int32
        The weight of each product.
    scheme : Scheme
    columns : int
        Logical length of the grouped axis, K.
    along_rows : bool
        Whether C is N instead of K.
    precision : {"highest", "default", "fast"}
        With "highest", sums are short.
    decode : callable, optional
        What makes rows dense; by default ``jax.numpy`` does.

    Returns
    -------
    array, shape (P, M, N), or (P, M, K) along the rows, x's dtype
    """
    products, count, _ = x.shape
    rows, exact = leaves[0].shape[1], precision == "highest"
    height = max(1, min(rows, TILE // columns))
    if along_rows and exact:
        height = min(height, _EXACT_LENGTH)
    parts = -(-rows // height)
    tile = _Tile(leaves, scheme, columns, height, decode)

    def step(place: Array, out: Array) -> Array:
        p, part = place // parts, place % parts
        first = jnp.minimum(part * height, rows - height)
        operand = lax.dynamic_index_in_dim(x, p, keepdims=False)
        if not along_rows:
            made = tile.against_groups(operand, which[p], first, exact)
            return lax.dynamic_update_slice(out, made[None], (p, jnp.int32(0), first))
        made = tile.against_rows(operand, which[p], first, first < part * height, part * height)
        return lax.dynamic_update_index_in_dim(out, lax.dynamic_index_in_dim(out, p, keepdims=False) + made, p, 0)

    out = jnp.zeros((products, count, columns if along_rows else rows), x.dtype)
    if products * parts == 1:
        return step(jnp.int32(0), out)
    return lax.fori_loop(jnp.int32(0), jnp.int32(products * parts), step, out)


class _Tile:
    """Rows of a stack of weights, `height` at a time."""

    def __init__(
        self, leaves: tuple[Array, Array, Array], scheme: Scheme, columns: int, height: int, decode: Decode | None
    ) -> None:
        self.leaves = leaves
        self.scheme = scheme
        self.columns = columns
        self.height = height
        self.decode = decode

    def against_groups(self, x: Array, weight: Array, first: Array, exact: bool) -> Array:
        """``x @ tile.T``."""
        if self.scheme.group_size is None and self.decode is None:
            return self._unscaled(x, weight, first, exact)
        return _matmul(x, self._dense(weight, first, x.dtype).T, exact)

    def against_rows(self, x: Array, weight: Array, first: Array, overlaps: Array, start: Array) -> Array:
        """``x[:, rows] @ tile``, rows before `start`, which another tile had, counting as 0."""
        part = lax.dynamic_slice_in_dim(x, first, self.height, axis=1)
        fresh = jnp.logical_or(~overlaps, first + jnp.arange(self.height) >= start)
        return _matmul(jnp.where(fresh, part, 0), self._dense(weight, first, x.dtype), False)

    def _dense(self, weight: Array, first: Array, dtype: Any) -> Array:
        if self.decode is not None:
            return self.decode(self.leaves, weight, first, self.height).astype(dtype)
        return codes.decode(*self._some(weight, first), self.scheme, self.columns, dtype)

    def _some(self, weight: Array, first: Array) -> list[Array]:
        zero = jnp.int32(0)
        return [
            lax.dynamic_slice(leaf, (weight, first, zero), (1, self.height, leaf.shape[2]))[0] for leaf in self.leaves
        ]

    def _unscaled(self, x: Array, weight: Array, first: Array, exact: bool) -> Array:
        """The product with the codes, scaled afterwards: where a row is one group, its few values' roundings add up."""
        packed, scales, biases = self._some(weight, first)
        scales, biases = scales[:, 0].astype(x.dtype), biases[:, 0].astype(x.dtype)
        zero = codes.origin(scales, biases, self.scheme.bits)
        centred = codes.unpack(packed, self.scheme.bits, self.columns).astype(x.dtype) - zero[:, None]
        summed = _matmul(x, jnp.ones((self.columns, 1), x.dtype), exact)
        return _matmul(x, centred.T, exact) * scales + summed * (biases + zero * scales)


def _matmul(x: Array, w: Array, exact: bool) -> Array:
    """``x @ w`` in full float32, which on GPUs and TPUs is not the default; in short sums where it must be exact."""
    length = x.shape[1]
    if not exact or x.dtype != jnp.float32 or length <= _EXACT_LENGTH:
        return jnp.matmul(x, w, precision=lax.Precision.HIGHEST)
    total = None
    for start in range(0, length, _EXACT_LENGTH):
        here = slice(start, start + _EXACT_LENGTH)
        part = jnp.matmul(x[:, here], w[here], precision=lax.Precision.HIGHEST)
        total = part if total is None else total + part
    return total
