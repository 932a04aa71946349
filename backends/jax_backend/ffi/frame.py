"""What a handler does with memory and with XLA's call frame, as Numba functions on raw addresses.

Addresses that differ from process to process (the version to report, tasks, kernels) are in one table, which the
compiled code finds by the name of a symbol: so it may be cached on disk.
"""

import ctypes
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from quantcore.scheme import BITS, GROUP_SIZES
from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, njit
from quantcore_backends.cpu_kernels.vectors import pointer_to
from quantcore_backends.jax_backend.ffi.abi import CONSTANTS, OFFSETS

__all__ = [
    "FIRST_BODY",
    "FIRST_ROUNDED",
    "KERNELS",
    "TABLE",
    "WIDEST",
    "answers_query",
    "argument",
    "atomic_add",
    "attribute",
    "call",
    "call2",
    "dimension",
    "error",
    "free",
    "is_array",
    "load32",
    "load64",
    "malloc",
    "result",
    "store32",
    "store64",
    "table",
    "yield_processor",
]


FIRST_BODY: Final = 16
FIRST_ROUNDED: Final = 256
KERNELS, WIDEST = 8, max(BITS)
"""Kernels for rounded rows or tiles, of a scheme; bits of a code at most."""
_USED: Final = FIRST_ROUNDED + 3 * KERNELS * WIDEST * (len(GROUP_SIZES) + 1)

TABLE: Final = (ctypes.c_int64 * (_USED + 8))()
"""Version of XLA's interface (two integers); most threads; the pool's task; the rounded products' task.

From `FIRST_BODY` on: bodies of kernels. From `FIRST_ROUNDED` on: rounder, kernel and a number for integer activations.
"""
_LAST_RESORT: Final = 8 * _USED  # in the table: where an error is put together if there is no memory
_SYMBOL: Final = "quantcore_xla_table"
llvm.add_symbol(_SYMBOL, ctypes.addressof(TABLE))

_EXTENSION, _API, _STAGE = OFFSETS["CallFrame.extension_start"], OFFSETS["CallFrame.api"], OFFSETS["CallFrame.stage"]
_NARGS, _ARGS = OFFSETS["CallFrame.args.size"], OFFSETS["CallFrame.args.args"]
_NRETS, _RETS = OFFSETS["CallFrame.rets.size"], OFFSETS["CallFrame.rets.rets"]
_NATTRS, _ATTR_TYPES = OFFSETS["CallFrame.attrs.size"], OFFSETS["CallFrame.attrs.types"]
_ATTRS = OFFSETS["CallFrame.attrs.attrs"]
_KIND, _NEXT = OFFSETS["Extension_Base.type"], OFFSETS["Extension_Base.next"]
_METADATA, _TRAITS = OFFSETS["Metadata_Extension.metadata"], OFFSETS["Metadata.traits"]
_MAJOR, _MINOR = OFFSETS["Metadata.api_version.major_version"], OFFSETS["Metadata.api_version.minor_version"]
_STATE_TYPE, _WITH_STATE_TYPE = 40, 48  # the last member of the struct from version 0.3 on
_DTYPE, _RANK, _DIMS = OFFSETS["Buffer.dtype"], OFFSETS["Buffer.rank"], OFFSETS["Buffer.dims"]
_ARRAY_DTYPE, _ARRAY_SIZE, _ARRAY_DATA = OFFSETS["Array.dtype"], OFFSETS["Array.size"], OFFSETS["Array.data"]
_ERROR_CREATE = OFFSETS["Api.XLA_FFI_Error_Create"]
_IS_METADATA, _IS_EXECUTE = CONSTANTS["Extension_Metadata"], CONSTANTS["ExecutionStage_EXECUTE"]
_IS_ARRAY, _IS_S64 = CONSTANTS["AttrType_ARRAY"], CONSTANTS["DataType_S64"]

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_int: Any = types.int64
_status: Any = types.int32

malloc: Any = types.ExternalFunction("malloc", _int(_int))
free: Any = types.ExternalFunction("free", types.void(_int))
yield_processor: Any = types.ExternalFunction("sched_yield", _status())


@intrinsic
def load64(typing: Any, address: Any) -> Any:
    """The 64-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer_to(builder, args[0], _I64), align=8)

    return _int(_int), generate


@intrinsic
def load32(typing: Any, address: Any) -> Any:
    """The 32-bit integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(pointer_to(builder, args[0], _I32), align=4), _I64)

    return _int(_int), generate


@intrinsic
def store64(typing: Any, address: Any, value: Any) -> Any:
    """Write a 64-bit integer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer_to(builder, args[0], _I64), align=8)
        return context.get_dummy_value()

    return types.void(_int, _int), generate


@intrinsic
def store32(typing: Any, address: Any, value: Any) -> Any:
    """Write a 32-bit integer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _I32), pointer_to(builder, args[0], _I32), align=4)
        return context.get_dummy_value()

    return types.void(_int, _int), generate


@intrinsic
def atomic_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to a 64-bit integer that threads share; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer_to(builder, args[0], _I64), args[1], "seq_cst")

    return _int(_int, _int), generate


@intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call a C function of one integer or pointer by its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

    return _int(_int, _int), generate


@intrinsic
def call2(typing: Any, function: Any, first: Any, second: Any) -> Any:
    """Call a C function of two integers or pointers by its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64, _I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])

    return _int(_int, _int, _int), generate


@intrinsic
def table(typing: Any) -> Any:
    """Address of `TABLE`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.module.globals.get(_SYMBOL)
        if found is None:
            found = cgutils.add_global_variable(builder.module, _I8, _SYMBOL)
            found.linkage = "external"
        return builder.ptrtoint(found, _I64)

    return _int(), generate


# --- the call frame -------------------------------------------------------------------------------------------


@njit(**INLINED)
def answers_query(frame):
    """Whether the frame asks for the handler's metadata, which is answered, or is of a stage without work."""
    extension = load64(frame + _EXTENSION)
    while extension != 0:
        if load32(extension + _KIND) == _IS_METADATA:
            metadata = load64(extension + _METADATA)
            store32(metadata + _MAJOR, load64(table()))
            store32(metadata + _MINOR, load64(table() + 8))
            store32(metadata + _TRAITS, 0)
            if load64(metadata) >= _WITH_STATE_TYPE:
                store64(metadata + _STATE_TYPE, 0)
            return True
        extension = load64(extension + _NEXT)
    return load32(frame + _STAGE) != _IS_EXECUTE


@njit(**CACHED)
def error(frame, message, code):
    """An error of XLA's: exceptions are lost between a compiled function and its C caller."""
    memory = malloc(32)
    args = memory if memory != 0 else table() + _LAST_RESORT
    store64(args, 28)
    store64(args + 8, 0)
    store64(args + 16, message)
    store32(args + 24, code)
    made = call(load64(load64(frame + _API) + _ERROR_CREATE), args)
    free(memory)
    return made


@njit(**INLINED)
def argument(frame, place, count):
    """The buffer of an operand; 0 where there aren't `count` operands."""
    return load64(load64(frame + _ARGS) + 8 * place) if load64(frame + _NARGS) == count else 0


@njit(**INLINED)
def result(frame):
    """The buffer of the one result; 0 where there are more."""
    return load64(load64(frame + _RETS)) if load64(frame + _NRETS) == 1 else 0


@njit(**INLINED)
def attribute(frame, count):
    """Address of the one attribute's `count` 64-bit integers; 0 where there is no such attribute."""
    if load64(frame + _NATTRS) != 1 or load32(load64(frame + _ATTR_TYPES)) != _IS_ARRAY:
        return 0
    array = load64(load64(frame + _ATTRS))
    if load32(array + _ARRAY_DTYPE) != _IS_S64 or load64(array + _ARRAY_SIZE) != count:
        return 0
    return load64(array + _ARRAY_DATA)


@njit(**INLINED)
def is_array(buffer, dtype, rank):
    """Whether there is a buffer, and of that dtype and rank."""
    return buffer != 0 and load32(buffer + _DTYPE) == dtype and load64(buffer + _RANK) == rank


@njit(**INLINED)
def dimension(buffer, axis):
    """Length of a buffer's axis."""
    return load64(load64(buffer + _DIMS) + 8 * axis)
