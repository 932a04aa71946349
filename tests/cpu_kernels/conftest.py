"""What the tests of kernels share."""

from __future__ import annotations

import pytest

_GUARD = """
import ctypes, mmap
import numpy as np
import quantcore as qc

libc, page = ctypes.CDLL(None), mmap.PAGESIZE
held = []

def at_the_end(array):
    pages = -(-array.nbytes // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    held.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    out = np.frombuffer(region, np.uint8, array.nbytes, pages * page - array.nbytes)
    out = out.view(array.dtype).reshape(array.shape)
    out[...] = array
    return out
"""


@pytest.fixture
def guard() -> str:
    """The beginning of a script: ``at_the_end`` copies an array to where an unreadable page follows it."""
    return _GUARD
