"""Files that nobody vouches for: mapped into memory, every range checked in Python integers before it is used."""

import json
import math
import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np

from quantcore.dtypes import dtype_name
from quantcore.errors import FormatError, UnsupportedError

__all__ = ["MAX_RANK", "Array", "MappedFile", "Stored", "malformed", "parse_json", "read_json", "unsupported"]

Array: TypeAlias = np.ndarray[Any, Any]

MAX_RANK: Final = 32
"""Axes that a tensor in a file may have; NumPy itself takes 64."""

MAX_JSON: Final = 100_000_000
"""Bytes of JSON that are parsed at most; the safetensors library has the same limit on its header."""

ENTRY_BYTES: Final = 1000
"""What Python takes, about, to know of one tensor."""

_JSON_BYTES: Final = 64
"""What Python takes for a brace, bracket, comma or quote, about."""

_ALLOWANCE: Final = 64 << 20
"""Bytes that a header may take in Python beyond twice the file's size."""


def malformed(file: Path, what: str, *, tensor: str | None = None, offset: int | None = None) -> NoReturn:
    """Raise the FormatError that names the file and, where they are known, the tensor and the byte offset."""
    where = str(file)
    if tensor is not None:
        where += f", tensor {_short(tensor)}"
    if offset is not None:
        where += f", byte {offset}"
    raise FormatError(f"{where}: {what}")


def unsupported(file: Path, what: str) -> NoReturn:
    """Raise the UnsupportedError that names the file, one that may well be in order."""
    raise UnsupportedError(f"{file}: {what}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")


class MappedFile:
    """A regular file, mapped read-only. Arrays taken from it keep the mapping alive; nothing is ever written.

    Parameters
    ----------
    path : Path

    Raises
    ------
    FormatError
        If it is empty or no regular file (a pipe would never end).
    OSError
        If it can't be opened.

    Notes
    -----
    As with every mapping, cutting the file short while it is in use ends the process with SIGBUS. Replacing it by a
    rename, as `quantcore.save` does, is harmless.
    """

    __slots__ = ("buffer", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = path
        if not stat.S_ISREG(os.stat(path).st_mode):
            malformed(path, "not a regular file")
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                malformed(path, "the file is empty", offset=0)
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.size = len(self.buffer)

    def check(self, offset: int, count: int, what: str, tensor: str | None = None) -> None:
        """Raise FormatError unless the file holds `count` bytes at `offset`."""
        if offset < 0 or count < 0 or offset + count > self.size:
            end = f"{count} bytes from {offset} on, the file ends at {self.size}"
            malformed(self.path, f"{what} lies outside the file ({end})", tensor=tensor, offset=offset)

    def check_memory(self, count: int, each: int, what: str) -> None:
        """Raise FormatError if `count` objects of `each` bytes are out of proportion to the file.

        A few bytes of a header become an object of hundreds. Beside a model's weights that is nothing; of a file that
        is all header it would be many times its size.
        """
        if count * each > 2 * self.size + _ALLOWANCE:
            malformed(self.path, f"{count} {what} in a file of {self.size} bytes, more than any model has", offset=0)

    def array(self, dtype: np.dtype[Any], shape: Sequence[int], offset: int, tensor: str | None = None) -> Array:
        """A read-only view of the mapping; a copy where the offset is not aligned for the dtype."""
        count = math.prod(shape)
        self.check(offset, count * dtype.itemsize, "its data", tensor)
        if count == 0:
            return np.empty(tuple(shape), dtype)
        flat = np.frombuffer(self.buffer, dtype, count, offset)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(tuple(shape))

    def release(self, offset: int, count: int) -> None:
        """Give back the memory that bytes of the file take, once they were read and copied.

        Views of them stay right: what is looked at again is read again, from the system's cache of the file.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self.buffer.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file, its range checked.

    Parameters
    ----------
    file : MappedFile
    name : str
    dtype : numpy.dtype
    shape : tuple of int
    offset : int
        First byte in the file.
    kind : str
        The format's own name of the dtype, ``"BF16"`` say.
    """

    file: MappedFile
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    kind: str

    @property
    def dtype_name(self) -> str:
        """Name of the dtype; NumPy itself takes microseconds to spell it."""
        return dtype_name(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> str:
        """File, name and offset, for an error."""
        return f"{self.file.path}, tensor {_short(self.name)}, byte {self.offset}"

    def array(self) -> Array:
        """The elements, as a read-only view of the file."""
        if self.dtype == np.bool_:
            raw = self.file.array(np.dtype(np.uint8), self.shape, self.offset, self.name)
            if raw.size and int(raw.max()) > 1:
                self.malformed("a boolean is neither 0 nor 1")
            return raw.view(np.bool_)
        return self.file.array(self.dtype, self.shape, self.offset, self.name)

    def malformed(self, what: str) -> NoReturn:
        """Raise the FormatError that names this tensor."""
        malformed(self.file.path, what, tensor=self.name, offset=self.offset)


def parse_json(text: bytes, mapped: MappedFile, *, start: int = 0) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique at every level.

    Parameters
    ----------
    text : bytes
    mapped : MappedFile
    start : int
        Where in the file the text begins, for the error.

    Raises
    ------
    FormatError
        If it isn't UTF-8, isn't JSON, isn't an object, has a key twice, NaN or infinity, or nests too deeply.
    """
    file = mapped.path
    if len(text) > MAX_JSON:
        malformed(file, f"{len(text)} bytes of JSON, more than the {MAX_JSON} that are read", offset=start)
    mapped.check_memory(sum(map(text.count, (b"{", b"[", b",", b'"'))), _JSON_BYTES, "JSON values")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        malformed(file, f"not JSON ({error.msg})", offset=start + len(error.doc[: error.pos].encode()))
    except UnicodeDecodeError as error:
        malformed(file, "the JSON isn't UTF-8", offset=start + error.start)
    except RecursionError:
        malformed(file, "the JSON nests too deeply", offset=start)
    except ValueError as error:
        malformed(file, f"bad JSON: {error}", offset=start)
    if not isinstance(found, dict):
        malformed(file, f"the JSON is a {type(found).__name__}, not an object", offset=start)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; see `parse_json`."""
    file = MappedFile(path)
    if file.size > MAX_JSON:
        malformed(path, f"{file.size} bytes of JSON, more than the {MAX_JSON} that are read", offset=0)
    return parse_json(file.buffer[:], file)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(twice)} occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
