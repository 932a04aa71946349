"""The compiled kernels of the microscaled modes on NumPy arrays: addresses, strides and threads."""

from functools import cache
from typing import Any, TypeAlias

import numpy as np

from quantcore import Scheme
from quantcore.memory import aligned_empty
from quantcore_backends.cpu_kernels import microscaled
from quantcore_backends.cpu_kernels.compiled import FLUSH, rows_in_memory
from quantcore_backends.cpu_kernels.threads import over_rows

__all__ = ["decode_block", "few_rows"]

Array: TypeAlias = np.ndarray[Any, Any]


def decode_block(packed: Array, scales: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """Columns `start` to `stop` of rows, in float32; `start` is a multiple of 256.

    Parameters
    ----------
    packed : array, shape (N, W), uint32
    scales : array, shape (N, G), uint8
    scheme : Scheme
        Of a microscaled mode.
    start, stop : int

    Returns
    -------
    array, shape (N, stop - start), float32
    """
    columns, group = stop - start, _group(scheme)
    dense = aligned_empty((packed.shape[0], columns), np.float32)
    packed, scales = rows_in_memory(packed, np.dtype(np.uint32)), rows_in_memory(scales, np.dtype(np.uint8))
    at, of_scale = packed.ctypes.data + start * scheme.bits // 8, scales.ctypes.data + start // group
    table, values = _tables(scheme)
    kernel = _kernels().dense_rows(scheme.bits)
    strides = packed.strides[0], scales.strides[0]

    def run(first: int, last: int) -> None:
        kernel(at, of_scale, table, values, dense[first:last], first, last, columns, group, *strides)

    over_rows(run, packed.shape[0], dense.size)
    return dense


def few_rows(x: Array, packed: Array, scales: Array, scheme: Scheme) -> Array:
    """``x @ w.T`` for few rows of x.

    Parameters
    ----------
    x : array, shape (M, K), float32, C-contiguous
    packed : array, shape (N, W), uint32
    scales : array, shape (N, G), uint8
    scheme : Scheme
        Of a microscaled mode.

    Returns
    -------
    array, shape (M, N), float32
    """
    rows, columns = x.shape
    group = _group(scheme)
    out = np.empty((packed.shape[0], rows), np.float32)
    packed, scales = rows_in_memory(packed, np.dtype(np.uint32)), rows_in_memory(scales, np.dtype(np.uint8))
    table, values = _tables(scheme)
    kernel = (_kernels().four_by_one if rows == 1 else _kernels().one_by_four)(scheme.bits)
    operands = x.ctypes.data, packed.ctypes.data, scales.ctypes.data, table, values
    shape = columns, group, FLUSH // group, packed.strides[0], scales.strides[0]

    def run(first: int, last: int) -> None:
        kernel(*operands, out[first:last], first, last, *shape)

    over_rows(run, packed.shape[0], packed.shape[0] * columns * rows)
    return out.T


def _group(scheme: Scheme) -> int:
    assert scheme.group_size is not None
    return scheme.group_size


@cache
def _tables(scheme: Scheme) -> tuple[int, Array]:
    """Address of what each byte stands for as a scale, which stays; and what codes of elements stand for."""
    codes = np.arange(1 << scheme.bits, dtype=np.uint8)
    values = microscaled.elements(codes, scheme.mode, np.dtype(np.float32))
    return microscaled.scale_table(scheme.mode).ctypes.data, values


def _kernels() -> Any:
    from quantcore_backends.cpu_kernels import kernels_microscaled

    return kernels_microscaled
