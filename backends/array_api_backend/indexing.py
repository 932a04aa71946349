"""Gathering in array-API code, where an index out of range must be neither silent nor fatal."""

from typing import Any, Final

from array_api_compat import array_namespace

__all__ = ["flat_stack", "nan_outside", "normalized", "take"]

Array = Any

_LAZY: Final = ("mlx", "jax", "dask")
"""Libraries in which reading the indices' values would force a computation, or is impossible inside a trace."""


def normalized(indices: Array, length: int) -> tuple[Array, Array | None]:
    """Indices in range, and which were in range to begin with (None: all, because others raised).

    Raises
    ------
    IndexError
        In eager libraries, where an index is out of range.
    """
    xp = array_namespace(indices)
    indices = xp.astype(indices, xp.int64)
    inside = xp.logical_and(indices >= -length, indices < length)
    wrapped = xp.where(indices < 0, indices + length, indices)
    if xp.__name__.removeprefix("array_api_compat.").partition(".")[0] not in _LAZY:
        if indices.size and not bool(xp.all(inside)):
            raise IndexError(f"an index is out of range for length {length}: {indices}")
        return wrapped, None
    return xp.clip(wrapped, 0, max(length - 1, 0)), inside


def take(array: Array, indices: Array, axis: int) -> Array:
    """``take`` for indices of any shape."""
    xp = array_namespace(array)
    shape = (*array.shape[:axis], *indices.shape, *array.shape[axis + 1 :])
    if array.shape[axis] == 0:
        return xp.zeros(shape, dtype=array.dtype)  # no index can be in range
    return xp.reshape(xp.take(array, xp.reshape(indices, (-1,)), axis=axis), shape)


def flat_stack(array: Array) -> Array:
    """The array with all axes but the last two made one."""
    count = 1
    for length in array.shape[:-2]:
        count *= length
    return array_namespace(array).reshape(array, (count, *array.shape[-2:]))


def nan_outside(rows: Array, inside: Array | None, axis: int) -> Array:
    """Rows with NaN wherever `inside`, whose axes start at `axis`, is false."""
    if inside is None:
        return rows
    xp = array_namespace(rows)
    after = len(rows.shape) - axis - len(inside.shape)
    mask = xp.reshape(inside, (*(1,) * axis, *inside.shape, *(1,) * after))
    return xp.where(mask, rows, xp.full((1,) * len(rows.shape), float("nan"), dtype=rows.dtype))
