"""safetensors files: the header, parsed and checked; the tensors, as ranges of the mapped file.

The layout is that of https://github.com/huggingface/safetensors: eight bytes with the header's length, the header
as JSON, the tensors' bytes without gap or overlap to the end of the file. Parsing it is a page of code that has to
name the tensor and the byte of whatever is wrong, so it is done here.
"""

import math
import struct
from typing import Any, Final

import ml_dtypes
import numpy as np

from quantcore.formats.files import ENTRY_BYTES, MAX_JSON, MAX_RANK, MappedFile, Stored, malformed, parse_json

__all__ = ["DTYPES", "looks_like", "read_header"]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
"""The dtypes of whole bytes; the library also names some of 4 and 6 bits, which NumPy can't hold."""

_PREFIX: Final = 8


def looks_like(file: MappedFile) -> bool:
    """Whether the file begins as a safetensors file does: a header's length, then an open brace."""
    return file.size > _PREFIX and file.buffer[_PREFIX : _PREFIX + 1] == b"{"


def read_header(file: MappedFile) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by name, in the order of their bytes, and the metadata.

    Raises
    ------
    FormatError
        If anything isn't as the format says.
    """
    file.check(0, _PREFIX, "the header's length")
    (length,) = struct.unpack_from("<Q", file.buffer)
    file.check(_PREFIX, length, "the header")
    if length > MAX_JSON:
        malformed(file.path, f"a header of {length} bytes, more than the {MAX_JSON} that are read", offset=0)
    header = parse_json(file.buffer[_PREFIX : _PREFIX + length], file, start=_PREFIX)
    file.check_memory(len(header), ENTRY_BYTES, "tensors")
    metadata = _metadata(header.pop("__metadata__", {}), file)
    data = _PREFIX + length
    tensors = [_stored(file, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda stored: (stored.offset, stored.nbytes))
    end = data
    for stored in tensors:
        if stored.offset != end:
            what = "overlaps the tensor before it" if stored.offset < end else "leaves a gap before it"
            stored.malformed(f"{what}, which ends at byte {end}")
        end += stored.nbytes
    if end != file.size:
        malformed(file.path, f"the tensors end at byte {end}, the file at {file.size}", offset=end)
    return {stored.name: stored for stored in tensors}, metadata


def _metadata(found: Any, file: MappedFile) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        malformed(file.path, "__metadata__ must map names to strings", offset=_PREFIX)
    return found


def _stored(file: MappedFile, name: str, entry: Any, data: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        malformed(file.path, "its entry must have dtype, shape and data_offsets", tensor=name, offset=_PREFIX)
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        malformed(file.path, f"unknown dtype {str(kind)[:40]!r}", tensor=name, offset=_PREFIX)
    if not _lengths(shape) or len(shape) > MAX_RANK:
        malformed(file.path, f"its shape must be at most {MAX_RANK} lengths", tensor=name, offset=_PREFIX)
    if not _lengths(offsets) or len(offsets) != 2:
        malformed(file.path, "data_offsets must be two positions", tensor=name, offset=_PREFIX)
    start, stop = offsets
    needed = math.prod(shape) * dtype.itemsize
    if stop - start != needed:
        malformed(
            file.path,
            f"{kind} of shape {str(shape)[:100]} takes {str(needed)[:40]} bytes, data_offsets give {stop - start}",
            tensor=name,
            offset=data + start,
        )
    file.check(data + start, needed, "its data", name)
    if max(shape, default=0) > file.size:  # only with another length of 0; NumPy refuses such products
        malformed(file.path, f"shape {str(shape)[:100]} is larger than the file", tensor=name, offset=data + start)
    return Stored(file, name, dtype, tuple(shape), data + start, kind)


def _lengths(found: Any) -> bool:
    return isinstance(found, list) and all(type(length) is int and 0 <= length < 1 << 63 for length in found)
