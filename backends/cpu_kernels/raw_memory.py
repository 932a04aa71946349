"""Bytes of memory copied and cleared, in compiled code.

Numba's assignments to slices do the same, but an assignment of an array brings with it the error for shapes that don't
fit, whose text takes longer to compile than a kernel.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import BYTE

__all__ = ["clear_bytes", "copy_bytes"]

_BIT = ir.IntType(1)


@intrinsic
def copy_bytes(typing: Any, to: Any, source: Any, size: Any) -> Any:
    """Copy `size` bytes from one address to another; the two pieces don't overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source = (_pointer(builder, address) for address in args[:2])
        _call(builder, "llvm.memcpy.p0.p0.i64", [to, source, args[2]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def clear_bytes(typing: Any, to: Any, size: Any) -> Any:
    """Make `size` bytes from an address on 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "llvm.memset.p0.i64", [_pointer(builder, args[0]), ir.Constant(BYTE, 0), args[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, BYTE.as_pointer())


def _call(builder: Any, name: str, arguments: list[Any]) -> None:
    kinds = [*(argument.type for argument in arguments), _BIT]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
    builder.call(function, [*arguments, ir.Constant(_BIT, 0)])  # not volatile
