"""Writing safetensors in one pass, a tensor at a time.

The safetensors library takes all tensors of a file at once, which is the whole model in memory. Here the header's place
is kept free at the beginning, and filled with spaces where it is shorter, as the format allows; until it is written the
file is none that loads.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from quantcore.formats.safetensors import DTYPES

__all__ = ["ShardWriter"]

_ENTRY: Final = 192
"""Bytes that are kept free for an entry of the header beside its name: dtype, offsets, some lengths."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """A safetensors file that tensors are added to.

    Parameters
    ----------
    path : Path
    tensors : int
        How many there will be, about.
    name_bytes : int
        Bytes that their names take, about.
    """

    def __init__(self, path: Path, *, tensors: int, name_bytes: int) -> None:
        self.nbytes = 0
        self._path = path
        self._free = _aligned(64 + tensors * _ENTRY + name_bytes)
        self._entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        self._file: IO[bytes] = path.open("xb")
        self._file.seek(8 + self._free)

    def add(self, name: str, array: "np.ndarray[Any, Any]") -> None:
        """Write a tensor.

        Raises
        ------
        TypeError
            If safetensors has no such dtype.
        """
        dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
        kind = _NAMES.get(dtype)
        if kind is None:
            raise TypeError(f"save: {name!r} has the dtype {array.dtype}, which safetensors can't hold")
        data = np.ascontiguousarray(array, dtype)
        offsets = [self.nbytes, self.nbytes + data.nbytes]
        self._entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        self._file.write(data.reshape(-1).view(np.uint8).data)
        self.nbytes += data.nbytes

    def close(self) -> None:
        """Write the header; the file is complete."""
        if self._file.closed:
            return
        header = json.dumps(self._entries, separators=(",", ":"), ensure_ascii=False).encode()
        with self._file:
            if len(header) > self._free:
                self._make_room(_aligned(len(header)))
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._free) + header.ljust(self._free))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _make_room(self, length: int) -> None:
        """Move the tensors to where a header of this length ends."""
        self._file.close()
        moved = self._path.with_suffix(".moved")
        with self._path.open("rb") as source, moved.open("xb") as target:
            source.seek(8 + self._free)
            target.seek(8 + length)
            shutil.copyfileobj(source, target, 1 << 20)
        moved.replace(self._path)
        self._file, self._free = self._path.open("r+b"), length


def _aligned(count: int) -> int:
    return -(-count // 8) * 8
