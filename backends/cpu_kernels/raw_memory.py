"""Bytes of memory copied and cleared, in compiled code.

Numba's assignments to slices do the same, but an assignment of an array brings with it the error for shapes that don't
fit, whose text takes longer to compile than a kernel.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import BYTE, called, pointer_to

__all__ = ["clear_bytes", "copy_bytes"]

_NOT_VOLATILE = ir.Constant(ir.IntType(1), 0)


@intrinsic
def copy_bytes(typing: Any, to: Any, source: Any, size: Any) -> Any:
    """Copy `size` bytes from one address to another; the two pieces don't overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source = (pointer_to(builder, address, BYTE) for address in args[:2])
        called(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [to, source, args[2], _NOT_VOLATILE])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def clear_bytes(typing: Any, to: Any, size: Any) -> Any:
    """Make `size` bytes from an address on 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, zero = pointer_to(builder, args[0], BYTE), ir.Constant(BYTE, 0)
        called(builder, "llvm.memset.p0.i64", ir.VoidType(), [to, zero, args[1], _NOT_VOLATILE])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate
