"""Products of rows of x, made integers, with packed rows, on NumPy arrays: which kernels, and what they are told."""

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from quantcore import Scheme
from quantcore_backends.cpu_kernels import amx, compiled, layout
from quantcore_backends.cpu_kernels.compiled import KINDS, rows_in_memory
from quantcore_backends.cpu_kernels.scratch import scratch
from quantcore_backends.cpu_kernels.threads import native_pool

__all__ = [
    "FLOATS",
    "IN_UNITS",
    "MOST",
    "THREADED",
    "UNTILED_ROWS",
    "WIDTHS",
    "Geometry",
    "RowKernels",
    "TileKernels",
    "Weight",
    "has_byte_dot",
    "has_wide",
    "multiply",
    "row_kernels",
    "serves",
    "tile_kernels",
    "widths",
]

Array: TypeAlias = np.ndarray[Any, Any]
Operand: TypeAlias = Array | int
"""An array, or its address."""

_FLOAT32: Final = np.dtype(np.float32)
_UINT32: Final = np.dtype(np.uint32)
UNTILED_ROWS: Final = 4
"""Rows of x up to which it doesn't pay to lay the weight in tiles."""
WIDTHS: Final = {"highest": 24, "default": 16, "fast": 8}
"""Bits of the integers that each precision asks for."""
FLOATS: Final = layout.FLOAT_WIDTH
"""Of tiles, the width that stands for x as it is, in float32."""
THREADED: Final = 1 << 18
"""Multiplications worth a second thread."""
MOST: Final = 512
"""Rows of x in one go, at most, which bounds the scratch memory."""
IN_UNITS: Final = {8: layout.MATRIX_HEIGHT, 16: 0}
"""Rows of x from which matrix units are faster than vectors, by the width of its integers."""
_PLANS: Final = 512
"""Plans that are kept, one for each shape of a weight and number of rows."""
_CALLS: Final = 16
"""Calls that a weight keeps, one for each number of rows and width."""


@cache
def _compiled() -> SimpleNamespace:
    """The modules that import Numba, with what is needed of them."""
    from quantcore_backends.cpu_kernels import (
        activations,
        ahead,
        calls,
        job,
        kernels_amx,
        kernels_int,
        kernels_int24,
        kernels_tiles,
        kernels_unpacked,
        laying,
        simd_amx,
        simd_int,
        vectors,
    )

    return SimpleNamespace(
        activations=activations,
        ahead=ahead,
        call=calls.call,
        job=job,
        lanes=vectors.LANES,
        held_bits=laying.held_bits,
        matrix=kernels_amx,
        matrix_units=simd_amx.on_target() and amx.permitted(),
        rows=kernels_int,
        rows24=kernels_int24,
        simd=simd_int,
        tiles=kernels_tiles,
        unpacked=kernels_unpacked,
    )


def serves(scheme: Scheme) -> bool:
    """Whether there are kernels for a scheme: Numba is there, and a group holds whole words of 1-bit codes."""
    return compiled.available() and scheme.has_biases and (scheme.bits, scheme.group_size) != (1, 16)


@cache
def has_byte_dot(scheme: Scheme) -> bool:
    """Whether 8-bit activations are faster here than 16-bit ones."""
    simd, held = _compiled().simd, _compiled().held_bits(scheme.bits)
    return simd.takes_bytes(scheme.bits) and simd.byte_dot(held) is not None


@cache
def has_wide(scheme: Scheme) -> bool:
    """Whether 24-bit activations serve few rows: the target has a dot of bytes, and a row more than one scale."""
    return scheme.group_size is not None and _compiled().simd.takes_bytes(scheme.bits)


def widths(scheme: Scheme, first: int, *, tiled: bool) -> tuple[int, ...]:
    """Widths that are worth a try here where `first` is asked for: after 8, 16 bits lose less.

    For 24, many rows of x, which take tiles, stay floats. Neither is exact enough where a row of the weight has one
    scale.
    """
    if first == 24:
        if tiled:
            return (FLOATS,) if scheme.group_size is not None else ()
        return (24,) if has_wide(scheme) else ()
    return (8, 16) if first == 8 and has_byte_dot(scheme) else (16,)


@cache
def _widths(scheme: Scheme) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """By precision, widths that are tried for few and for many rows of x: last 24 bits of few, and floats of many."""
    found, wide = {}, widths(scheme, WIDTHS["highest"], tiled=False)
    for precision, width in WIDTHS.items():
        few, many = (widths(scheme, width, tiled=tiled) for tiled in (False, True))
        found[precision] = (few, many) if precision == "highest" else ((*few, *wide), (*many, FLOATS))
    return found


class RowKernels(NamedTuple):
    """Kernels for few rows of x, with the codes that they take at a time."""

    rounder: Any
    kernel: Any
    step: int


def row_kernels(scheme: Scheme, width: int, together: int) -> RowKernels:
    """What rounds few rows of x to integers of `width` bits, and what multiplies them.

    Those of 16 and 8 bits are taken one row of x at a time, or two.
    """
    modules = _compiled()
    run = modules.activations.run_length(scheme.group_size)
    step = modules.activations.step_codes(scheme.bits, run)
    if width == 24:
        kernel = modules.rows24.four_rows(scheme.bits, run, max(1, step // (scheme.group_size or step)))
    else:
        sharing = (scheme.group_size or 0) // run
        kernel = modules.rows.four_rows(scheme.bits, run, sharing, width, together)
    return RowKernels(modules.activations.row_rounder(scheme.bits, run, width), kernel, step)


class TileKernels(NamedTuple):
    """Kernels for many rows of x, with the rows of a block."""

    rounder: Any
    kernel: Any
    height: int


def tile_kernels(scheme: Scheme, width: int, rows: int = MOST) -> TileKernels:
    """What rounds many rows of x to integers of `width` bits, or lays them as floats, and what multiplies them.

    `rows` is about how many: few are faster in vectors.
    """
    modules = _compiled()
    run = modules.activations.run_length(scheme.group_size, width)
    height = 8 if modules.lanes == 16 else 4
    if width == FLOATS:
        kernel = modules.unpacked.unpacked_tiles(scheme.bits, run, width, height)
        return TileKernels(modules.activations.block_copier(run, height), kernel, height)
    if modules.matrix_units and rows >= IN_UNITS[width]:
        height, kernel = layout.MATRIX_HEIGHT, modules.matrix.matrix_tiles(scheme.bits, run, width)
    elif modules.lanes == 16:
        kernel = modules.tiles.tiles(scheme.bits, run, width, height)
    else:
        kernel = modules.unpacked.unpacked_tiles(scheme.bits, run, width, height)
    rounder = modules.activations.block_rounder(modules.held_bits(scheme.bits), run, width, height)
    return TileKernels(rounder, kernel, height)


class Geometry(NamedTuple):
    """All of a weight but its memory: what a plan depends on.

    Attributes
    ----------
    scheme : Scheme
    columns, rows, words, groups : int
        Features in and out, and of a row the words and the groups.
    packed_row, scale_row : int
        Bytes from row to row.
    kind : int
        Of the scales and biases, in :data:`compiled.KINDS`.
    independent : int
        As of :func:`likeness.independent_rows`; `rows` where nobody looked.
    """

    scheme: Scheme
    columns: int
    rows: int
    words: int
    groups: int
    packed_row: int
    scale_row: int
    kind: int
    independent: int


class Weight:
    """A packed matrix as the kernels take it: where its arrays lie, and what they are.

    Parameters
    ----------
    geometry : Geometry
    addresses : tuple of int
        Of packed, scales and biases. Each row lies in one piece.
    held : tuple of array, optional
        What keeps that memory; without, the caller does during each product.
    zero_point : int, optional
        As of :func:`zero_points.common_zero_point`. Unless it is 0, products of x of 16 and 8 bits don't read biases.
    """

    __slots__ = ("_calls", "_held", "addresses", "geometry", "slot", "widths", "zero_point")

    def __init__(
        self,
        geometry: Geometry,
        addresses: tuple[int, int, int],
        held: tuple[Array, ...] = (),
        zero_point: int = 0,
    ) -> None:
        self.geometry, self.addresses, self._held, self.zero_point = geometry, addresses, held, zero_point
        (packed, scales, biases), size = addresses, geometry.rows * geometry.scale_row
        read = (scales, size), (biases, 0 if zero_point else size)
        self.slot = _compiled().ahead.slot_of((packed, geometry.rows * geometry.packed_row), *read)
        self.widths = _widths(geometry.scheme)
        self._calls: dict[tuple[int, int], _Call] = {}

    @classmethod
    def of(
        cls,
        packed: Array,
        scales: Array,
        biases: Array,
        scheme: Scheme,
        in_features: int,
        zero_point: int = 0,
        independent: int | None = None,
    ) -> "Weight":
        """That of arrays, or of copies that the kernels can read.

        Parameters
        ----------
        packed : array, shape (N, W), uint32
        scales, biases : array, shape (N, G), float32, float16 or bfloat16
        scheme : Scheme
        in_features, zero_point : int
        independent : int, optional
            As in :class:`Geometry`.
        """
        dtype = scales.dtype
        if dtype not in KINDS or not (dtype == biases.dtype or (zero_point and _fits(biases, dtype))):
            dtype = _FLOAT32
        packed = rows_in_memory(packed, _UINT32)
        scales, biases = rows_in_memory(scales, dtype), rows_in_memory(biases, dtype)
        if scales.strides != biases.strides:
            scales, biases = np.ascontiguousarray(scales), np.ascontiguousarray(biases)
        (rows, words), groups = packed.shape, scales.shape[1]
        rows_apart = packed.strides[0], scales.strides[0]
        independent = rows if independent is None else independent
        geometry = Geometry(scheme, in_features, rows, words, groups, *rows_apart, KINDS[dtype], independent)
        held = packed, scales, biases
        return cls(geometry, (packed.ctypes.data, scales.ctypes.data, biases.ctypes.data), held, zero_point)

    def call(self, width: int, rows: int) -> "_Call":
        """How the product with so many rows of x, as integers of `width` bits, is called."""
        found = self._calls.get((width, rows))
        if found is None:
            if len(self._calls) >= _CALLS:
                self._calls.clear()
            found = self._calls[width, rows] = _Call(_plan(self.geometry, width, rows), self, width)
        return found

    def fields(self, width: int) -> dict[str, int]:
        """What a job says of the weight beyond its geometry, where x has integers of `width` bits or is floats."""
        packed, scales, biases = self.addresses
        if not self.zero_point or width in (24, FLOATS):
            return {"packed": packed, "scales": scales, "biases": biases, "sum_factor": 1}
        return {"packed": packed, "scales": scales, "biases": scales, "sum_factor": -self.zero_point}


def _fits(biases: Array, dtype: np.dtype[Any]) -> bool:
    """Whether multiples of numbers of a type, by powers of two, are finite in it: then they are exact."""
    return bool(np.abs(biases).max(initial=0) <= ml_dtypes.finfo(dtype).max)


class _Plan:
    """Kernels, where what lies in scratch memory, and the fields of a job that a weight's geometry decides."""

    def __init__(self, geometry: Geometry, width: int, rows: int) -> None:
        modules = _compiled()
        scheme, columns, outputs, words, groups, packed_row, scale_row, kind, independent = geometry
        bits, group, lanes = scheme.bits, scheme.group_size or 0, modules.lanes
        run = modules.activations.run_length(scheme.group_size, width)
        self.height, together = 0, layout.together(rows, UNTILED_ROWS)
        if width != 24 and not together:
            rounder, kernel, self.height = tile_kernels(scheme, width, rows)
            sizes = layout.of_tiles(rows, columns, groups, bits, run, lanes, width, self.height)
        else:
            rounder, kernel, step = row_kernels(scheme, width, together)
            sizes = layout.of_few_rows(columns, groups, bits, group, run, step, lanes, width)
        of_weight = outputs, columns, words, groups, packed_row, scale_row, kind, bits, group
        fixed = layout.plan(*of_weight, run, *sizes, layout.bound(independent, width))
        fields = dict(zip(modules.job.PLAN, fixed, strict=True))
        copied = (outputs - fields["safe"]) * fields["copy_row"]
        _, _, codes, scales, sums, _, scratch = sizes
        places = layout.places(modules.job.JOB.itemsize, rows, self.height, codes, scales, sums, copied)
        self.threads = native_pool().threads if rows * columns * outputs >= THREADED else 1
        rounded, parts, part = layout.turns(rows, outputs, self.height, lanes, self.threads)
        fields |= {"x_row": 4 * columns, "rows": rows}
        fields |= dict(zip(("codes", "code_scales", "sums", "copy", "scratch"), places, strict=True))
        self.fields, self.turns = fields, (4 * words, rounder.address, rows, rounded, kernel.address, parts, part)
        self.size = places[-1] + scratch * self.threads
        self._held = rounder, kernel


_plan = lru_cache(_PLANS)(_Plan)


class _Call:
    """A plan with a weight's addresses: all but x, the result and the threads of a product."""

    __slots__ = ("_address", "_compiled", "_held", "_size", "_threaded")

    def __init__(self, plan: _Plan, weight: Weight, width: int) -> None:
        modules, slot = _compiled(), 0 if plan.height else weight.slot
        fields = plan.fields | weight.fields(width)
        record = np.array([*(fields.get(name, 0) for name in modules.job.JOB.names), *plan.turns, slot], np.int64)
        self._address, self._held = record.ctypes.data, (record, plan)
        self._compiled, self._size, self._threaded = modules.call, plan.size, plan.threads > 1

    def __call__(self, x: Operand, out: Operand) -> bool:
        """Compute ``out = x @ w.T``; whether integers served, so that `out` is right."""
        memory = scratch(self._size)
        pool = native_pool().address if self._threaded else 0
        served: bool = self._compiled(pool, x, out, self._address, memory.address)
        return served


def multiply(x: Operand, rows: int, weight: Weight, out: Operand, width: int) -> bool:
    """``out = x @ w.T`` with x rounded to `width` bits, or in floats; whether that served, so that `out` is right.

    Parameters
    ----------
    x, out : array or int
        Arrays of shape (M, K) and (M, N), float32, C-contiguous, or both their addresses.
    rows : int
        M, not 0.
    weight : Weight
        Of shape (N, K).
    width : int
        16 or 8; 24 for few rows of x, `FLOATS` for more than `UNTILED_ROWS`.
    """
    if rows <= MOST:
        return weight.call(width, rows)(x, out)
    columns, outputs = weight.geometry.columns, weight.geometry.rows
    parts = -(-rows // MOST)
    for part in range(parts):  # of equal lengths: a few rows that are left over would take kernels of another kind
        start, end = rows * part // parts, rows * (part + 1) // parts
        if not weight.call(width, end - start)(_from_row(x, start, columns), _from_row(out, start, outputs)):
            return False
    return True


def _from_row(operand: Operand, row: int, columns: int) -> Operand:
    return operand + 4 * row * columns if isinstance(operand, int) else operand[row:]
