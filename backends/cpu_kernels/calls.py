"""A call of the integer kernels in compiled code: from Python it would take longer than a small product."""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload

from quantcore_backends.cpu_kernels.disk_cache import COMPILED, njit
from quantcore_backends.cpu_kernels.job import CALL, JOB, addresses_at
from quantcore_backends.cpu_kernels.pool import parallel
from quantcore_backends.cpu_kernels.raw_memory import copy_bytes

__all__ = ["call"]

_FIELD: Final = {name: place for place, name in enumerate(JOB.names or ())}
_X, _OUT, _PACKED, _REFUSED = (_FIELD[name] for name in ("x", "out", "packed", "refused"))
_CODES, _COPY, _SCRATCH = (_FIELD[name] for name in ("codes", "copy", "scratch"))
_SAFE, _OUTPUTS, _PACKED_ROW, _COPY_ROW = (_FIELD[name] for name in ("safe", "out_features", "packed_row", "copy_row"))
_FIELDS: Final = len(_FIELD)
_COPIED, _ROUNDER, _ROWS, _ROUNDED, _KERNEL, _PARTS, _PART, _SLOT = range(_FIELDS, _FIELDS + 8)

assert CALL.index("codes") + 3 == CALL.index("packed")
assert CALL.index("copy") + 1 == CALL.index("scratch")


def _address(operand: Any) -> Any:
    """Where an array lies; an address is one already."""


@overload(_address)
def _address_of(operand):
    if isinstance(operand, types.Array):
        return lambda operand: operand.ctypes.data
    return lambda operand: operand


@njit(cache=True, **COMPILED)
def call(pool: Any, x: Any, out: Any, record: Any, memory: Any) -> Any:
    """Round x to integers, then multiply; whether integers served, so that `out` is right.

    Parameters
    ----------
    pool : int
        Address, or 0.
    x, out : array, shape (M, K) and (M, N), float32, C-contiguous
        Or their addresses.
    record : int
        Address of int64: a job that lacks x and the result, and whose addresses in `memory` count from there; the bytes
        of a packed row that are copied; twice a kernel's address, its parts, and the length of a part; and the
        weight's slot in the table of :mod:`ahead`, or 0.
    memory : int
        Address of scratch memory, that of a cache line.
    """
    given, job = addresses_at(record, _SLOT + 1), addresses_at(memory, _FIELDS)
    copy_bytes(memory, record, 8 * _FIELDS)
    job[_X], job[_OUT] = _address(x), _address(out)
    for field in (_CODES, _CODES + 1, _CODES + 2, _COPY, _SCRATCH):
        job[field] += memory
    for n in range(job[_SAFE], job[_OUTPUTS]):
        to = job[_COPY] + (n - job[_SAFE]) * job[_COPY_ROW]
        copy_bytes(to, job[_PACKED] + n * job[_PACKED_ROW], given[_COPIED])
    rows, rounded = given[_ROWS], given[_ROUNDED]
    parallel(pool if rows > rounded else 0, given[_ROUNDER], memory, rows, rounded, np.int64(0))
    if job[_REFUSED] == 0:
        parallel(pool, given[_KERNEL], memory, given[_PARTS], given[_PART], given[_SLOT])
    return job[_REFUSED] == 0
