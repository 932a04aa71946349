"""GGUF files, versions 2 and 3: the header, parsed and checked; the tensors, lazily.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is followed only as far as
the file reaches, every string and array is looked at where it lies, and long arrays of strings (a vocabulary) stay in
the mapping, so that memory follows the file's size, not what its header claims.
"""

import math
import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, overload

import numpy as np

from quantcore.formats import gguf_blocks
from quantcore.formats.checkpoint import Entry
from quantcore.formats.files import ENTRY_BYTES, MappedFile, malformed

__all__ = ["MAGIC", "Strings", "read_checkpoint"]

MAGIC: Final = b"GGUF"

_MAX_DIMS: Final = 4  # ggml's
_SCALARS: Final = {
    code: np.dtype(name)
    for code, name in {
        0: "u1",
        1: "i1",
        2: "<u2",
        3: "<i2",
        4: "<u4",
        5: "<i4",
        6: "<f4",
        7: "?",
        10: "<u8",
        11: "<i8",
        12: "<f8",
    }.items()
}
_STRING: Final = 8
_ARRAY: Final = 9
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 1 << 20
_MAX_SPLITS: Final = 9999  # five digits in a split's file name, as llama.cpp writes it
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class Strings(Sequence[str]):
    """An array of strings in a GGUF file, each decoded when it is asked for."""

    __slots__ = ("_file", "_starts")

    def __init__(self, file: MappedFile, starts: "array[int]") -> None:
        self._file = file
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._at(start) for start in self._starts[index]]
        return self._at(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._at, self._starts)

    def _at(self, start: int) -> str:
        (length,) = _U64.unpack_from(self._file.buffer, start)
        return _text(self._file, start + 8, length)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Strings([{shown}{', ...' if len(self) > 3 else ''}], {len(self)} of them)"


def _text(file: MappedFile, start: int, length: int) -> str:
    # Tokens cut in the middle of a character occur; llama.cpp keeps such bytes.
    return file.buffer[start : start + length].decode("utf-8", "surrogateescape")


class _Cursor:
    """Reads one value after the other, never past the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    def take(self, count: int, what: str, tensor: str | None = None) -> int:
        """Move over `count` bytes; where they begin."""
        start = self.at
        self.file.check(start, count, what, tensor)
        self.at += count
        return start

    def u32(self, what: str, tensor: str | None = None) -> int:
        """A little-endian uint32."""
        return int(_U32.unpack_from(self.file.buffer, self.take(4, what, tensor))[0])

    def u64(self, what: str, tensor: str | None = None) -> int:
        """A little-endian uint64."""
        return int(_U64.unpack_from(self.file.buffer, self.take(8, what, tensor))[0])

    def string(self, what: str) -> str:
        """A length and so many bytes."""
        length = self.u64(f"the length of {what}")
        return _text(self.file, self.take(length, what), length)

    def name(self, what: str) -> str:
        """A string that is UTF-8."""
        begin, found = self.at, self.string(what)
        if any("\udc80" <= character <= "\udcff" for character in found):
            self.malformed(f"{what} isn't UTF-8", offset=begin)
        return found

    def strings(self, count: int, what: str) -> Strings:
        """So many strings, walked over."""
        buffer, at, last = self.file.buffer, self.at, self.file.size - 8
        unpack, starts = _U64.unpack_from, array("Q")
        for _ in range(count):
            if at > last:
                self.file.check(at, 8, what)
            starts.append(at)
            at += 8 + unpack(buffer, at)[0]
        self.file.check(self.at, at - self.at, what)
        self.at = at
        return Strings(self.file, starts)

    def malformed(self, what: str, tensor: str | None = None, offset: int | None = None) -> NoReturn:
        """Raise the FormatError for the place that was read last."""
        malformed(self.file.path, what, tensor=tensor, offset=self.at if offset is None else offset)


def read_checkpoint(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries by name and the metadata of a GGUF file, or of all files of a split one.

    Raises
    ------
    FormatError
        If a file isn't as the format says, or a split is missing.
    """
    entries, metadata = _read_file(MappedFile(path))
    count = metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= _MAX_SPLITS:
        malformed(path, f"split.count must be a number up to {_MAX_SPLITS}, not {str(count)[:40]}")
    if count <= 1:
        return entries, metadata
    first = metadata if metadata.get("split.no") == 0 else None
    own = metadata.get("split.no")
    for number, sibling in enumerate(_siblings(path, count)):
        if number == own:
            continue
        more, its_metadata = _read_file(MappedFile(sibling))
        if its_metadata.get("split.no") != number or its_metadata.get("split.count") != count:
            malformed(sibling, f"split.no and split.count don't make it part {number + 1} of {count}")
        for name, entry in more.items():
            if name in entries:
                malformed(sibling, "another split has a tensor of that name", tensor=name)
            entries[name] = entry
        first = its_metadata if number == 0 else first
    total = metadata.get("split.tensors.count")
    if total is not None and total != len(entries):
        malformed(path, f"split.tensors.count says {total} tensors, the {count} files hold {len(entries)}")
    return entries, first or metadata


def _siblings(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        malformed(path, f"one of {count} splits, but its name doesn't end in -NNNNN-of-{count:05}.gguf as theirs do")
    found = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for sibling in found:
        if not sibling.is_file():
            malformed(sibling, f"this split of {path.name} is missing")
    return found


def _read_file(file: MappedFile) -> tuple[dict[str, Entry], dict[str, Any]]:
    cursor = _Cursor(file)
    start = cursor.take(4, "the magic number")
    if file.buffer[start : start + 4] != MAGIC:
        cursor.malformed("not a GGUF file", offset=0)
    version = cursor.u32("the version")
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        cursor.malformed("a big-endian GGUF file" if big else f"GGUF version {version}; 2 and 3 are read", offset=4)
    tensors, pairs = cursor.u64("the number of tensors"), cursor.u64("the number of key-value pairs")
    # A pair takes at least 13 bytes, a tensor 32: neither loop can run longer than the file.
    if pairs * 13 + tensors * 24 > file.size:
        cursor.malformed(f"{tensors} tensors and {pairs} key-value pairs don't fit into {file.size} bytes", offset=8)
    file.check_memory(tensors + pairs, ENTRY_BYTES, "tensors and key-value pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        begin = cursor.at
        key = cursor.name("a key")
        if key in metadata:
            cursor.malformed(f"the key {key[:100]!r} occurs twice", offset=begin)
        metadata[key] = _value(cursor, key)
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.malformed(f"general.alignment must be a power of two, not {str(alignment)[:40]}", offset=None)
    data = -(-cursor.at // alignment) * alignment
    return _entries(file, infos, data, alignment), metadata


def _value(cursor: _Cursor, key: str) -> Any:
    what = f"the value of {key[:100]!r}"
    kind = cursor.u32(f"the type of {key[:100]!r}")
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1, what)[0].item()
    kind = cursor.u32(f"the type of {key[:100]!r}")
    count = cursor.u64(f"the length of {key[:100]!r}")
    if kind == _STRING:
        return cursor.strings(count, what)
    return _numbers(cursor, kind, count, what)


def _numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray[Any, Any]:
    dtype = _SCALARS.get(kind)
    if dtype is None:
        # An array of arrays is allowed by the letter; llama.cpp takes none either.
        cursor.malformed(f"{what} has the type {kind}, which isn't read")
    start = cursor.take(count * dtype.itemsize, what)
    found = cursor.file.array(np.dtype(np.uint8) if dtype == np.bool_ else dtype, (count,), start)
    if dtype != np.bool_:
        return found
    if found.size and int(found.max()) > 1:
        cursor.malformed(f"{what} has a boolean that is neither 0 nor 1", offset=start)
    return found.view(np.bool_)


_Info = tuple[str, tuple[int, ...], int, int]


def _info(cursor: _Cursor) -> _Info:
    """Name, shape in NumPy's order, type and offset of a tensor."""
    name = cursor.name("a tensor's name")
    begin = cursor.at
    rank = cursor.u32("the rank", name)
    if rank > _MAX_DIMS:
        cursor.malformed(f"{rank} axes; ggml has at most {_MAX_DIMS}", name, begin)
    shape = tuple(cursor.u64("the shape", name) for _ in range(rank))[::-1]
    if max(shape, default=0) >= 1 << 63:
        cursor.malformed(f"a length of {max(shape)}", name, begin)
    return name, shape, cursor.u32("the type", name), cursor.u64("the offset", name)


def _entries(file: MappedFile, infos: list[_Info], data: int, alignment: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, shape, code, relative in infos:
        offset = data + relative
        if name in entries:
            malformed(file.path, "another tensor has the same name", tensor=name, offset=offset)
        if relative % alignment:
            malformed(file.path, f"its offset isn't a multiple of {alignment}", tensor=name, offset=offset)
        kind = gguf_blocks.TYPES.get(code)
        if kind is None:
            malformed(file.path, f"the type {code} isn't known", tensor=name, offset=offset)
        row = shape[-1] if shape else 1
        if row % kind.block:
            what = f"rows of {row} elements aren't whole blocks of {kind.block} ({kind.name})"
            malformed(file.path, what, tensor=name, offset=offset)
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        file.check(offset if nbytes else 0, nbytes, "its data", name)
        if max(shape, default=0) > file.size * kind.block:  # only with another length of 0
            malformed(file.path, f"the shape {shape} is larger than the file", tensor=name, offset=offset)
        ranges.append((offset, offset + nbytes, name))
        entries[name] = gguf_blocks.entry(file, name, shape, kind, offset, nbytes)
    _check_apart(file, ranges)
    return entries


def _check_apart(file: MappedFile, ranges: list[tuple[int, int, str]]) -> None:
    end = 0
    for start, stop, name in sorted(ranges):
        if start < min(end, stop):
            malformed(file.path, "its data overlaps another tensor's", tensor=name, offset=start)
        end = max(end, stop)
