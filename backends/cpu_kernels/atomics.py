"""Words of memory that threads share, in compiled code."""

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.vectors import pointer_to

__all__ = ["WORD", "add_to_word", "load_word", "replaced", "store_word"]

WORD: Final = ir.IntType(64)


@intrinsic
def load_word(typing: Any, address: Any) -> Any:
    """The word at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(pointer_to(builder, args[0], WORD), "seq_cst", 8)

    return types.int64(types.intp), generate


@intrinsic
def store_word(typing: Any, address: Any, value: Any) -> Any:
    """Write a word."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer_to(builder, args[0], WORD), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def add_to_word(typing: Any, address: Any, value: Any) -> Any:
    """Add to a word, and give what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer_to(builder, args[0], WORD), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def replaced(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace a word if it is as expected; whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(pointer_to(builder, args[0], WORD), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.int64, types.int64), generate
