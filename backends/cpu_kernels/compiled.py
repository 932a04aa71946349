"""The compiled kernels on NumPy arrays: addresses, strides, threads, and what the vectors may not read past."""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from quantcore import Scheme
from quantcore.memory import aligned_empty
from quantcore_backends.cpu_kernels.threads import over_rows

__all__ = [
    "FEW_ROWS",
    "FLUSH",
    "KINDS",
    "OVERREAD",
    "ROW_SPAN",
    "available",
    "decode_block",
    "few_rows",
    "few_rows_along",
    "rows_in_memory",
]

Array: TypeAlias = np.ndarray[Any, Any]

FEW_ROWS: Final = 12
"""Rows of x up to which unpacking in registers beats making the weight dense for BLAS."""

KINDS: Final = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
"""Numbers of the dtypes of scales, and of weights, as kernels take them."""
ROW_SPAN: Final = 256
"""Columns of a partial sum where the whole row is one group."""
FLUSH: Final = 4096
"""Columns after which partial sums go into float64."""
_RAISED: Final = 32
"""As a power of two, about how large the largest element of a row of x is made for the product along the rows."""
_COLUMNS_AT_ONCE: Final = 256
"""Columns of a product along the rows whose sums stay in the nearest cache."""
OVERREAD: Final = 16
"""Bytes that a vector of 3-, 5- or 6-bit codes may read beyond them."""


@cache
def _kernels() -> ModuleType | None:
    if os.environ.get("QUANTCORE_COMPILED", "1") == "0":
        return None
    try:
        from quantcore_backends.cpu_kernels import kernels
    except ImportError:
        return None  # the extra `fast` isn't installed
    return kernels


def available() -> bool:
    """Whether Numba is there, and ``QUANTCORE_COMPILED`` isn't 0."""
    return _kernels() is not None


def decode_block(packed: Array, scales: Array, biases: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """Columns `start` to `stop` of rows, in float32; `start` is a multiple of 256.

    Parameters
    ----------
    packed : array, shape (N, W), uint32
    scales, biases : array, shape (N, G)
    scheme : Scheme
    start, stop : int

    Returns
    -------
    array, shape (N, stop - start), float32
    """
    columns = stop - start
    dense = aligned_empty((packed.shape[0], columns), np.float32)
    operands = _Operands(packed, scales, biases, scheme)
    kernel = _module().dense_rows(scheme.bits, operands.kind)

    def run(part: _Operands, out: Array, first: int, last: int) -> None:
        kernel(*part.from_column(start), out, first, last, columns, part.span, *part.strides)

    _over_rows(operands, dense, run, dense.size)
    return dense


def few_rows(x: Array, packed: Array, scales: Array, biases: Array, scheme: Scheme) -> Array:
    """``x @ w.T`` for few rows of x.

    Parameters
    ----------
    x : array, shape (M, K), float32, C-contiguous
    packed : array, shape (N, W), uint32
    scales, biases : array, shape (N, G)
    scheme : Scheme

    Returns
    -------
    array, shape (M, N), float32
    """
    rows, columns = x.shape
    out = np.empty((packed.shape[0], rows), np.float32)
    operands = _Operands(packed, scales, biases, scheme)
    module = _module()
    sums = np.empty((rows, -(-columns // operands.span)), np.float64)
    module.span_sums(x, rows, columns, operands.span, sums)
    kernel = (module.four_by_one if rows == 1 else module.one_by_four)(scheme.bits, operands.kind)
    flush = max(1, FLUSH // operands.span)
    address = x.ctypes.data

    def run(part: _Operands, out: Array, first: int, last: int) -> None:
        kernel(address, sums, *part.from_column(0), out, first, last, columns, part.span, flush, *part.strides)

    _over_rows(operands, out, run, packed.shape[0] * columns * rows)
    return out.T


def few_rows_along(x: Array, packed: Array, scales: Array, biases: Array, scheme: Scheme, in_features: int) -> Array:
    """``x @ w`` for few rows of x, contracted along the rows of w.

    Parameters
    ----------
    x : array, shape (M, N), float32, C-contiguous
    packed : array, shape (N, W), uint32
    scales, biases : array, shape (N, G)
    scheme : Scheme
    in_features : int
        Logical length K of the grouped axis.

    Returns
    -------
    array, shape (M, K), float32
    """
    from quantcore_backends.cpu_kernels.transposed import rows_by_few

    count, rows = x.shape
    out = np.empty((count, in_features), np.float32)
    # The kernel multiplies x by scales: powers of two keep the products from where float32 loses digits.
    _, exponents = np.frexp(np.abs(x).max(axis=1, keepdims=True))
    powers = np.ldexp(np.float32(1), np.minimum(_RAISED - exponents, 126))
    x = x * powers
    # Scales of other kinds become float32 here, in a hundredth of the product's time: each kind would take a kernel.
    scales, biases = scales.astype(np.float32, copy=False), biases.astype(np.float32, copy=False)
    operands = _Operands(packed, scales, biases, scheme)
    kernel, span = rows_by_few(scheme.bits, operands.kind), operands.span
    packed_at, *of_scales = operands.from_column(0)
    safe, tail = operands.safe_rows(), operands.last_rows()
    of_x = x.ctypes.data, 4 * rows, count
    of_weight = packed_at, tail.ctypes.data - safe * operands.strides[0], safe, *of_scales
    shape = rows, in_features, span, *operands.strides
    spans, at_once = -(-in_features // span), max(1, _COLUMNS_AT_ONCE // span)

    def run(first: int, last: int) -> None:
        narrow, wide = np.empty(count * (at_once * span + 4), np.float32), np.empty(count * at_once, np.float64)
        for start in range(first, last, at_once):
            end = min(start + at_once, last)
            kernel(*of_x, *of_weight, out, narrow, wide, start, end, *shape)

    over_rows(run, spans, rows * in_features * count)
    out /= powers
    return out


class _Operands:
    """Addresses and strides of a packed matrix. Keeps the arrays alive while kernels read them."""

    def __init__(self, packed: Array, scales: Array, biases: Array, scheme: Scheme) -> None:
        self.packed = rows_in_memory(packed, np.dtype(np.uint32))
        kind = np.dtype(np.float32) if scales.dtype != biases.dtype else scales.dtype.newbyteorder("=")
        if kind not in KINDS:
            kind = np.dtype(np.float32)
        self.scales, self.biases = rows_in_memory(scales, kind), rows_in_memory(biases, kind)
        if self.scales.strides != self.biases.strides:
            self.scales, self.biases = np.ascontiguousarray(scales, kind), np.ascontiguousarray(biases, kind)
        self.kind = KINDS[kind]
        self.scheme = scheme
        self.span = scheme.group_size or ROW_SPAN
        step = kind.itemsize if scheme.group_size else 0
        self.strides = (self.packed.strides[0], self.scales.strides[0], step)

    def from_column(self, start: int) -> tuple[int, int, int]:
        """Addresses of packed, scales and biases at a column."""
        step = start // self.span * self.strides[2]
        offset = start * self.scheme.bits // 8
        return self.packed.ctypes.data + offset, self.scales.ctypes.data + step, self.biases.ctypes.data + step

    def safe_rows(self) -> int:
        """Rows from the first on behind whose codes a vector may read."""
        rows, row = self.packed.shape[0], self.strides[0]
        if 32 % self.scheme.bits == 0:
            return rows
        return max(0, rows - -(-OVERREAD // row)) if row else 0

    def last_rows(self) -> Array:
        """Bytes of the rows that aren't safe, as far from each other as in memory, and what a vector may read."""
        packed = self.packed[self.safe_rows() :]
        (rows, words), row = packed.shape, self.strides[0]
        memory = np.zeros(max(0, rows - 1) * row + 4 * words + OVERREAD, np.uint8)
        np.ndarray(packed.shape, np.uint32, memory, 0, (row, 4))[...] = packed
        return memory

    def padded(self, rows: slice) -> "_Operands":
        """Some rows, copied to where there is memory behind each that a vector may read."""
        packed = self.packed[rows]
        room = np.zeros((packed.shape[0], packed.shape[1] + OVERREAD // 4), np.uint32)
        room[:, : packed.shape[1]] = packed
        return _Operands(room, self.scales[rows], self.biases[rows], self.scheme)


def _over_rows(operands: _Operands, out: Array, run: Callable[[_Operands, Array, int, int], None], work: int) -> None:
    """Run a kernel over all rows; over the last ones from a padded copy, where a vector reads past its codes."""
    rows, safe = operands.packed.shape[0], operands.safe_rows()
    if safe:
        over_rows(lambda first, last: run(operands, out[first:last], first, last), safe, work)
    if safe < rows:
        run(operands.padded(slice(safe, rows)), out[safe:], 0, rows - safe)


def rows_in_memory(array: Array, dtype: np.dtype[Any]) -> Array:
    """The array with each row in one piece, in native byte order; itself where it is so already."""
    native = array.astype(dtype, copy=False)
    return native if native.strides[-1] == dtype.itemsize and native.strides[0] >= 0 else np.ascontiguousarray(native)


def _module() -> Any:
    module = _kernels()
    assert module is not None
    return module
