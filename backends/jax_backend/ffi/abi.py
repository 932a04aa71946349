"""Whether this jaxlib's typed FFI has the struct layouts that the handlers were written for.

The handlers read XLA's structs at fixed offsets. The offsets are derived anew from the C header that jaxlib ships, and
must be those of the table below: a header of another shape, or another version of the interface, and the handlers
aren't used.
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

__all__ = ["CONSTANTS", "OFFSETS", "VERSIONS", "header", "mismatch", "read_header"]

VERSIONS: Final = ((0, 1), (0, 2), (0, 3), (0, 4))
"""Versions of the interface whose structs these are."""

OFFSETS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "CallFrame.extension_start": 8,
        "CallFrame.api": 16,
        "CallFrame.ctx": 24,
        "CallFrame.stage": 32,
        "CallFrame.args.size": 56,
        "CallFrame.args.args": 72,
        "CallFrame.rets.size": 96,
        "CallFrame.rets.rets": 112,
        "CallFrame.attrs.size": 136,
        "CallFrame.attrs.types": 144,
        "CallFrame.attrs.attrs": 160,
        "Extension_Base.type": 8,
        "Extension_Base.next": 16,
        "Metadata_Extension.metadata": 24,
        "Metadata.struct_size": 0,
        "Metadata.api_version.major_version": 24,
        "Metadata.api_version.minor_version": 28,
        "Metadata.traits": 32,
        "Buffer.dtype": 16,
        "Buffer.data": 24,
        "Buffer.rank": 32,
        "Buffer.dims": 40,
        "Array.dtype": 0,
        "Array.size": 8,
        "Array.data": 16,
        "Api.XLA_FFI_Error_Create": 48,
        "Api.XLA_FFI_Error_Destroy": 64,
        "Api.XLA_FFI_ThreadPool_Schedule": 136,
        "Api.XLA_FFI_ThreadPool_NumThreads": 144,
        "Error_Create_Args.message": 16,
        "Error_Create_Args.errc": 24,
        "Error_Destroy_Args.error": 16,
        "ThreadPool_Schedule_Args.ctx": 16,
        "ThreadPool_Schedule_Args.task": 24,
        "ThreadPool_Schedule_Args.data": 32,
        "ThreadPool_NumThreads_Args.ctx": 16,
        "ThreadPool_NumThreads_Args.num_threads": 24,
    }
)
"""Where the handlers look, by struct and member."""

CONSTANTS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "Extension_Metadata": 1,
        "Error_Code_INVALID_ARGUMENT": 3,
        "Error_Code_RESOURCE_EXHAUSTED": 8,
        "DataType_S32": 4,
        "DataType_S64": 5,
        "DataType_U32": 8,
        "DataType_F16": 10,
        "DataType_F32": 11,
        "DataType_BF16": 16,
        "AttrType_ARRAY": 1,
        "ExecutionStage_EXECUTE": 3,
    }
)
"""Values of the enumerations that the handlers compare with."""

_PREFIX: Final = "XLA_FFI_"
_PRIMITIVES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "size_t": ctypes.c_size_t,
        "int": ctypes.c_int,
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "uint32_t": ctypes.c_uint32,
        f"{_PREFIX}Handler_Traits": ctypes.c_uint32,
    }
)


def mismatch(include_dir: str) -> str:
    """Why the handlers can't be used with the jaxlib whose headers are there; empty where they can."""
    if sys.platform == "win32" or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return "the compiled XLA targets are for little-endian 64-bit POSIX systems"
    try:
        with open(header(include_dir), encoding="utf-8") as file:
            version, offsets, constants = read_header(file.read())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"jaxlib's FFI header can't be read ({type(error).__name__}: {error})"
    if version not in VERSIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        return f"jaxlib's FFI is version {version[0]}.{version[1]}; the compiled targets know {known}"
    for name, wanted in {**OFFSETS, **CONSTANTS}.items():
        found = {**offsets, **constants}.get(name)
        if found != wanted:
            return f"{_PREFIX}{name} is {found} in jaxlib's FFI header, not {wanted}"
    return ""


def header(include_dir: str) -> str:
    """Path of the C header of XLA's typed FFI."""
    return os.path.join(include_dir, "xla", "ffi", "api", "c_api.h")


def read_header(text: str) -> tuple[tuple[int, int], dict[str, int], dict[str, int]]:
    """The version, the offsets of `OFFSETS` and the values of `CONSTANTS` in the C header of XLA's typed FFI.

    Raises
    ------
    ValueError, KeyError, AttributeError
        If the text isn't of that form.
    """
    major, minor = (_number(rf"#define {_PREFIX}API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(rf"_{_PREFIX}API_STRUCT_FIELD\((\w+)\)\s*;", r"\1* \1;", text)
    text = text.replace(f"{_PREFIX}InternalExtension", f"{_PREFIX}Extension_Base")  # its name from 0.4 on
    constants: dict[str, int] = {}
    types: dict[str, Any] = dict(_PRIMITIVES)
    for enum in re.finditer(r"(?:typedef )?enum\s*\w*\s*\{([^}]*)\}\s*(\w*)\s*;", text):
        for name, value in re.findall(r"(\w+)\s*=\s*(\d+)u?\b(?!\s*<<)", enum.group(1)):
            constants[name.removeprefix(_PREFIX)] = int(value)
        types[enum.group(2)] = ctypes.c_int
    for struct in re.finditer(r"(?:typedef )?struct\s+(\w+)\s*\{(.*?)\}\s*\w*\s*;", text, flags=re.DOTALL):
        fields = [_field(member, types) for member in struct.group(2).split(";") if member.strip()]
        types[struct.group(1)] = type(struct.group(1), (ctypes.Structure,), {"_fields_": fields})
    offsets = {name: _offset(types, name) for name in OFFSETS}
    return (major, minor), offsets, {name: constants[name] for name in CONSTANTS}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r}")
    return int(found.group(1))


def _field(member: str, types: Mapping[str, Any]) -> tuple[str, Any]:
    pointer = re.match(r".*\(\*(\w+)\)\s*\(", member.strip(), flags=re.DOTALL)
    if pointer:
        return pointer.group(1), ctypes.c_void_p
    plain = re.sub(r"\b(const|struct)\b", "", member).strip()
    found = re.match(r"(\w+\s*\**)\s*(\w+)$", plain)
    if found is None:
        raise ValueError(f"unknown member {plain!r}")
    kind, name = found.groups()
    return name, ctypes.c_void_p if "*" in kind else types[kind.strip()]


def _offset(types: Mapping[str, Any], name: str) -> int:
    """Offset of a member, which may lie in a struct within the struct."""
    struct, *path = name.split(".")
    inside, total = types[_PREFIX + struct], 0
    for part in path:
        total += getattr(inside, part).offset
        inside = dict(inside._fields_)[part]
    return total
