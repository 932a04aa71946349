"""What the tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable

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


_SPLIT = """
import llvmlite.binding as llvm
import numba
numba.njit(lambda x: x)(0)  # from here on Numba knows the host
host = llvm.get_host_cpu_features
llvm.get_host_cpu_features = lambda: {**dict(host()), **FEATURES}
"""


@pytest.fixture
def split() -> Callable[..., str]:
    """The beginning of a script in which vectors have 16 lanes: our code is told of AVX-512, LLVM splits them.

    The function takes features that are there besides.
    """

    def script(*more: str) -> str:
        there = dict.fromkeys(("avx512f", "avx512bw", "avx512vl", *more), True)
        return _SPLIT.replace("FEATURES", repr({"avx512vnni": False, "avx512vbmi": False, **there}))

    return script
