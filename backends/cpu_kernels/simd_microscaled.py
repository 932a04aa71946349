"""Elements of the microscaled modes, small floats, as vectors of float32."""

from typing import Any, Final

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.simd import whole_words
from quantcore_backends.cpu_kernels.vectors import BYTE, DWORDS, FLOATS, LANES, constant, floats, read

__all__ = ["elements"]

_DOUBLED: Final = 0xC8643210
"""Twice the magnitudes of e2m1, four bits each."""
_REBIASED: Final = 120 << 23
"""What float32's exponent is more than e4m3's."""
_STEP: Final = 2.0**-9
"""Between e4m3's subnormal numbers."""


@intrinsic(prefer_literal=True)
def elements(typing: Any, address: Any, bits: Any) -> Any:
    """LANES elements from a bitstream that starts at a byte.

    e2m1 where `bits`, a compile-time constant, is 4; e4m3 where it is 8.
    """
    width = bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _e2m1(builder, args[0]) if width == 4 else _e4m3(builder, args[0])

    return floats(types.intp, bits), generate


def _e2m1(builder: Any, address: Any) -> Any:
    words, shifts = whole_words(builder, address, 4)
    codes = builder.lshr(words, constant(shifts))
    places = builder.and_(builder.shl(codes, _all(2)), _all(28))
    doubled = builder.and_(builder.lshr(_all(_DOUBLED), places), _all(15))
    magnitude = builder.fmul(builder.sitofp(doubled, FLOATS), _floats(0.5))
    return _signed(builder, magnitude, builder.and_(builder.shl(codes, _all(28)), _all(1 << 31)))


def _e4m3(builder: Any, address: Any) -> Any:
    codes = builder.zext(read(builder, address, ir.VectorType(BYTE, LANES)), DWORDS)
    magnitude = builder.and_(codes, _all(127))
    normal = builder.bitcast(builder.add(builder.shl(magnitude, _all(20)), _all(_REBIASED)), FLOATS)
    small = builder.fmul(builder.sitofp(magnitude, FLOATS), _floats(_STEP))
    value = builder.select(builder.icmp_unsigned("<", magnitude, _all(8)), small, normal)
    value = builder.select(builder.icmp_unsigned("==", magnitude, _all(127)), _floats(float("nan")), value)
    return _signed(builder, value, builder.and_(builder.shl(codes, _all(24)), _all(1 << 31)))


def _signed(builder: Any, magnitude: Any, sign: Any) -> Any:
    return builder.bitcast(builder.or_(builder.bitcast(magnitude, DWORDS), sign), FLOATS)


def _all(value: int) -> Any:
    return constant([value] * LANES)


def _floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)
