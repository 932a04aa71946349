"""Intrinsics of Intel's matrix units (AMX): rows of x times columns of codes, up to 16 by 16 by 64 bytes at once.

The units' registers, the tiles, are named by number, in code and in the configuration that says how large each is. See
Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.blocks import count_down
from quantcore_backends.cpu_kernels.disk_cache import COMPILED, njit
from quantcore_backends.cpu_kernels.job import bytes_at
from quantcore_backends.cpu_kernels.layout import CONFIGURATION
from quantcore_backends.cpu_kernels.raw_memory import clear_bytes
from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    DWORDS,
    FLOAT,
    FLOATS,
    LANES,
    QWORD,
    called,
    constant,
    fused,
    offset,
    pointer_to,
    read,
    repeat,
    target_has,
    write,
)

__all__ = ["configure", "matrix_product", "on_target", "release"]

_SUMS: Final = (0, 1)
_CODES: Final = 2
_X: Final = (3, 4)
_ROW: Final = 64
_TILE: Final = 1024


def on_target() -> bool:
    """Whether the code that Numba makes may use the units."""
    return LANES == 16 and all(target_has(name) for name in ("avx512vnni", "amx-tile", "amx-int8"))


def _call(builder: Any, name: str, *arguments: Any) -> None:
    called(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)


def _tile(number: int) -> Any:
    return ir.Constant(BYTE, number)


@intrinsic
def _load_configuration(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "ldtilecfg", pointer_to(builder, args[0], BYTE))
        return context.get_dummy_value()

    return types.void(types.intp), generate


@njit(**COMPILED)
def configure(place, height, run):
    """Make the tiles as large as :func:`matrix_product` needs them; `place` is the address of a configuration."""
    configuration = bytes_at(place, CONFIGURATION)
    clear_bytes(place, CONFIGURATION)
    configuration[0] = 1
    for tile in range(_X[1] + 1):
        configuration[16 + 2 * tile] = run if tile in _X else _ROW
        configuration[48 + tile] = run // 4 if tile == _CODES else height
    _load_configuration(place)


@intrinsic
def release(typing: Any) -> Any:
    """Give the tiles back: until then, the thread's state is a long one to save."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def matrix_product(
    typing: Any,
    x: Any,
    x_scales: Any,
    codes: Any,
    scales: Any,
    out: Any,
    spill: Any,
    runs: Any,
    left: Any,
    group_runs: Any,
    height: Any,
    run: Any,
    layers: Any,
) -> Any:
    """Add to a block of the result the products of some runs. From `height` on, compile-time constants.

    Parameters
    ----------
    x : int
        Address of the block's activations: run by run, row by row, layer by layer.
    x_scales : int
        Of each run, the rows' scales, then those times the rows' sums.
    codes : int
        Of each run, four codes of each of LANES outputs, then the next four.
    scales : int
        Of each group, the outputs' scales, then their biases.
    out : int
        float32, LANES outputs for each row of x.
    spill : int
        Where sums go through memory.
    runs, left, group_runs : int
        At least one run; those that are left of the first's group; those that share a scale of the weight.
    height, run, layers : int
        Rows of the block, as configured, elements of a run, bytes of an activation.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = _Block(builder, args, *(n.literal_value for n in (height, run, layers)))
        one, runs = ir.Constant(QWORD, 1), args[6]
        block.multiply(ir.Constant(QWORD, 0))
        # The units multiply a run while the one before it is scaled.
        with cgutils.for_range_slice(builder, one, runs, one) as (at, _):
            block.multiply(at)
            block.scale(builder.sub(at, one))
        block.scale(builder.sub(runs, one))
        block.give()
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, height, run, layers), generate


class _Block:
    """Code of a block: sums of each run in tiles, scaled into float32 registers."""

    def __init__(self, builder: Any, args: Any, height: int, run: int, layers: int) -> None:
        self.builder, self.height, self.run, self.layers = builder, height, run, layers
        self.x, self.x_scales, self.codes, scales, self.out, self.spill, _, left, self.group_runs = args[:9]
        self.group = cgutils.alloca_once_value(builder, scales)
        self.left = cgutils.alloca_once_value(builder, left)
        self.rows = [cgutils.alloca_once_value(builder, read(builder, self._row(row), FLOATS)) for row in range(height)]

    def _row(self, row: int) -> Any:
        return offset(self.builder, self.out, row * _ROW)

    def _at(self, start: Any, number: Any, size: int) -> Any:
        return self.builder.add(start, self.builder.mul(number, ir.Constant(QWORD, size)))

    def _spilled(self, number: Any) -> Any:
        """Where the sums of a run go: not where those of the one before are."""
        odd = self.builder.and_(number, ir.Constant(QWORD, 1))
        return self._at(self.spill, odd, len(_SUMS) * _TILE)

    def multiply(self, number: Any) -> None:
        """Products of one run, summed, to memory."""
        builder, x_row = self.builder, self.run * self.layers
        x, codes = self._at(self.x, number, self.height * x_row), self._at(self.codes, number, self.run * LANES)
        stride, spilled = ir.Constant(QWORD, _ROW), self._spilled(number)
        _call(builder, "tileloadd64", _tile(_CODES), pointer_to(builder, codes, BYTE), stride)
        for layer in range(self.layers):
            its = pointer_to(builder, offset(builder, x, layer * self.run), BYTE)
            _call(builder, "tilezero", _tile(_SUMS[layer]))
            _call(builder, "tileloadd64", _tile(_X[layer]), its, ir.Constant(QWORD, x_row))
            _call(builder, "tdpbsud", _tile(_SUMS[layer]), _tile(_X[layer]), _tile(_CODES))
        for layer in range(self.layers):
            to = pointer_to(builder, offset(builder, spilled, layer * _TILE), BYTE)
            _call(builder, "tilestored64", _tile(_SUMS[layer]), to, stride)

    def scale(self, number: Any) -> None:
        """``rows += sum * x_scale * scale + bias * x_sum``; runs are scaled one after another."""
        builder = self.builder
        spilled, x_scales = self._spilled(number), self._at(self.x_scales, number, 8 * self.height)
        group = builder.load(self.group)
        scale, bias = read(builder, group, FLOATS), read(builder, offset(builder, group, _ROW), FLOATS)
        for row, place in enumerate(self.rows):
            total = read(builder, offset(builder, spilled, row * _ROW), DWORDS)
            for layer in range(1, self.layers):
                lower = read(builder, offset(builder, spilled, layer * _TILE + row * _ROW), DWORDS)
                total = builder.add(builder.shl(total, constant([8] * LANES)), lower)
            x_scale = repeat(builder, read(builder, offset(builder, x_scales, row * 4), FLOAT), LANES)
            x_sum = repeat(builder, read(builder, offset(builder, x_scales, (self.height + row) * 4), FLOAT), LANES)
            biased = fused(builder, bias, x_sum, builder.load(place))
            product = builder.fmul(builder.sitofp(total, FLOATS), x_scale)
            builder.store(fused(builder, product, scale, biased), place)
        count_down(builder, self.left, self.group_runs, self.group, 2 * _ROW)

    def give(self) -> None:
        """The block back to memory."""
        for row, place in enumerate(self.rows):
            write(self.builder, self._row(row), self.builder.load(place))
