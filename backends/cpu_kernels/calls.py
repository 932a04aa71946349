"""A call of the integer kernels in compiled code: from Python it would take longer than a small product."""

from typing import Any, Final

from numba import types
from numba.extending import overload

from quantcore_backends.cpu_kernels.disk_cache import njit
from quantcore_backends.cpu_kernels.job import CALL, COMPILED, JOB, addresses_at, bytes_at
from quantcore_backends.cpu_kernels.pool import parallel

__all__ = ["call"]

_FIELD: Final = {name: place for place, name in enumerate(JOB.names or ())}
_X, _OUT, _REFUSED = (_FIELD[name] for name in ("x", "out", "refused"))
_PACKED, _SCALES, _BIASES = (_FIELD[name] for name in ("packed", "scales", "biases"))
_CODES, _COPY, _SCRATCH = (_FIELD[name] for name in ("codes", "copy", "scratch"))
_SAFE, _OUTPUTS, _PACKED_ROW, _COPY_ROW = (_FIELD[name] for name in ("safe", "out_features", "packed_row", "copy_row"))
_FIELDS: Final = len(_FIELD)

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
def call(
    pool: Any, x: Any, out: Any, memory: Any, template: Any, packed: Any, scales: Any, biases: Any, slot: Any
) -> Any:
    """Round x to integers, then multiply; whether integers served, so that `out` is right.

    Parameters
    ----------
    pool : int
        Address, or 0.
    x, out : array, shape (M, K) and (M, N), float32, C-contiguous
        Or their addresses.
    memory : array, uint8
    template : array, int64
        A job in which addresses in `memory` count from its first whole cache line; then the bytes of a packed row,
        and twice a kernel's address, its parts, and the length of a part.
    packed, scales, biases : int
        Addresses.
    slot : int
        The weight's, in the table of :mod:`ahead`; 0 for none.
    """
    start = (memory.ctypes.data + 63) // 64 * 64
    job = addresses_at(start, _FIELDS)
    job[:] = template[:_FIELDS]
    job[_X], job[_OUT] = _address(x), _address(out)
    job[_PACKED], job[_SCALES], job[_BIASES] = packed, scales, biases
    for field in (_CODES, _CODES + 1, _CODES + 2, _COPY, _SCRATCH):
        job[field] += start
    turns = template[_FIELDS:]
    for n in range(job[_SAFE], job[_OUTPUTS]):
        to = bytes_at(job[_COPY] + (n - job[_SAFE]) * job[_COPY_ROW], turns[0])
        to[:] = bytes_at(packed + n * job[_PACKED_ROW], turns[0])
    parallel(pool if turns[2] > turns[3] else 0, turns[1], start, turns[2], turns[3])
    if job[_REFUSED] == 0:
        parallel(pool, turns[4], start, turns[5], turns[6], slot)
    return job[_REFUSED] == 0
