"""The two turns of a product of integers, rounding and multiplying, divided among threads.

A thread takes parts of the first turn until none is left, waits for those that others took, and goes on to the second:
so threads are called once, and one that comes late joins whatever is being done.
"""

from typing import Final

from numba import types

from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, cfunc, njit
from quantcore_backends.cpu_kernels.job import job_at
from quantcore_backends.cpu_kernels.pool import call_kernel
from quantcore_backends.jax_backend.ffi import pool
from quantcore_backends.jax_backend.ffi.frame import TABLE, atomic_add, call2, load64, store64, table

__all__ = ["TOLD", "install", "run", "set_jobs", "set_multiplying", "set_rounding"]

# What threads are told: the first job, bytes from job to job, how many jobs; then of each turn the kernel, what it goes
# over in a job, how much of that is a part, and on lines of their own the next part and how many are done.
_JOBS, _STRIDE, _COUNT = 0, 8, 16
_KERNEL, _ALL, _SIZE, _NEXT, _DONE = 0, 8, 16, 64, 128
_ROUNDING, _MULTIPLYING = 64, 256
TOLD: Final = 448
"""Bytes of that."""


@njit(**INLINED)
def set_jobs(told, jobs, stride, count):
    """Write down where the jobs are."""
    store64(told + _JOBS, jobs)
    store64(told + _STRIDE, stride)
    store64(told + _COUNT, count)


@njit(**INLINED)
def _set_turn(turn, kernel, whole, size):
    store64(turn + _KERNEL, kernel)
    store64(turn + _ALL, whole)
    store64(turn + _SIZE, size)
    store64(turn + _NEXT, 0)
    store64(turn + _DONE, 0)


@njit(**INLINED)
def set_rounding(told, kernel, whole, size):
    """Write down the first turn: `size` of the `whole` are a part."""
    _set_turn(told + _ROUNDING, kernel, whole, size)


@njit(**INLINED)
def set_multiplying(told, kernel, whole, size):
    """Write down the second turn."""
    _set_turn(told + _MULTIPLYING, kernel, whole, size)


@njit(**INLINED)
def _parts(turn):
    """Parts of a job in a turn."""
    return (load64(turn + _ALL) + load64(turn + _SIZE) - 1) // load64(turn + _SIZE)


@njit(**CACHED)
def _take_turn(told, turn, thread):
    """Do parts until all are done, but none of a job that integers don't serve."""
    whole, size, parts = load64(turn + _ALL), load64(turn + _SIZE), _parts(turn)
    count = parts * load64(told + _COUNT)
    part = atomic_add(turn + _NEXT, 1)
    while part < count:
        job, first = load64(told + _JOBS) + part // parts * load64(told + _STRIDE), part % parts * size
        if job_at(job).refused == 0:
            call_kernel(load64(turn + _KERNEL), job, thread, first, min(first + size, whole))
        atomic_add(turn + _DONE, 1)
        part = atomic_add(turn + _NEXT, 1)
    pool.wait(turn + _DONE, count)


@cfunc(types.int64(types.int64, types.int64), cache=True, boundscheck=False, error_model="numpy")
def _task(thread, told):
    """What one thread does; its number says which scratch memory is its own."""
    _take_turn(told, told + _ROUNDING, thread)
    _take_turn(told, told + _MULTIPLYING, thread)
    return 0


@njit(**CACHED)
def run(frame, told, threads):
    """Do all of it, in at most so many threads; False without memory."""
    task = load64(table() + 32)
    parts = load64(told + _COUNT) * max(_parts(told + _ROUNDING), _parts(told + _MULTIPLYING))
    if min(threads, parts) > 1:
        return pool.for_chunks(frame, task, told, min(threads, parts))
    call2(task, 0, told)
    return True


def install() -> None:
    """Put the task into the table."""
    TABLE[4] = _task.address
