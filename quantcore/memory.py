"""NumPy memory: that begins with a cache line, and that nobody writes to."""

import math
from typing import Any, Final

import numpy as np

__all__ = ["aligned", "aligned_empty", "freeze", "is_frozen"]

_LINE: Final = 64
"""Bytes of a cache line."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """An uninitialized array that begins with a cache line.

    Vectors of a whole line, as kernels read weights in, then touch one line each. NumPy's large arrays begin 16 bytes
    behind a line's start, so that every such vector touches two.

    Parameters
    ----------
    shape : tuple of int
    dtype : dtype

    Returns
    -------
    array, shape `shape`
        C-contiguous.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return np.ndarray(shape, dtype, memory, start)


def aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array, or a copy where it isn't C-contiguous or doesn't begin with a cache line.

    Parameters
    ----------
    array : array

    Returns
    -------
    array, of the same shape and dtype
    """
    if array.flags.c_contiguous and array.ctypes.data % _LINE == 0:
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def freeze(array: np.ndarray[Any, Any]) -> None:
    """Make an array read-only, and all arrays that it is a view of: for memory that nobody else holds.

    Parameters
    ----------
    array : array
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base.flags.writeable = False
        base = base.base


def is_frozen(array: np.ndarray[Any, Any]) -> bool:
    """Whether nobody can write to an array, through it or through what it is a view of: what it holds may be kept.

    As far as flags say: who made an array may set its flag again and write to it, and a file that is mapped read-only
    may be written to. Neither is looked for.

    Parameters
    ----------
    array : array

    Returns
    -------
    bool
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        if isinstance(base, memoryview):
            base = base.obj  # a read-only view may be of what can be written to
            continue
        if base.flags.writeable:
            return False
        base = base.base
    try:
        return base is None or memoryview(base).readonly
    except TypeError:
        return False
