import numpy as np
from numba import njit

from quantcore_backends.cpu_kernels.simd import fma, load, store
from quantcore_backends.cpu_kernels.vectors import LANES, VECTOR_BYTES


@njit(forceinline=True)
def _add_squares(to, place, source, count):
    for k in range(count):
        x = load(source + VECTOR_BYTES * k)
        store(to + place, fma(x, x, load(to + place)))
        store(to + place + VECTOR_BYTES, fma(x, x, load(to + place + VECTOR_BYTES)))


@njit
def _first_place_only(to, source, count):
    for place in range(min(1, count)):
        _add_squares(to, place * 4096, source, count)


def test_what_is_written_at_an_offset_of_zero_stays() -> None:
    # The callee's code comes to the caller with the offset as the pointer, which is null there.
    source, to = np.ones(2 * LANES, np.float32), np.zeros(2 * LANES, np.float32)
    _first_place_only(to.ctypes.data, source.ctypes.data, 2)
    assert to.tolist() == [2] * (2 * LANES)
