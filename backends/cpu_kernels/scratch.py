"""Memory that a call needs only while it runs."""

import threading
from typing import Final

import numpy as np

from quantcore.memory import aligned_empty

__all__ = ["scratch"]

_KEPT: Final = 1 << 20
"""Bytes, at most, that a thread keeps for its next call: allocating takes a tenth of the time of a small product."""


class _Memory:
    """Memory whose address is that of a cache line."""

    __slots__ = ("_held", "address", "size")

    def __init__(self, size: int) -> None:
        self._held = aligned_empty((size,), np.uint8)
        self.address, self.size = self._held.ctypes.data, size


class _Kept(threading.local):
    memory = _Memory(0)


_kept = _Kept()


def scratch(size: int) -> _Memory:
    """Memory of at least so many bytes, for one call in this thread; the next call may get the same."""
    found = _kept.memory
    if size <= found.size:
        return found
    made = _Memory(size)
    if size <= _KEPT:
        _kept.memory = made
    return made
