"""A pool of threads inside compiled code: parts of a kernel are handed out in a few microseconds, whoever calls.

Numba's own parallel regions aren't used: under its default layer two Python threads that enter one abort the process,
and a process that has used GNU OpenMP can't be forked. The workers here are Python threads that have left the
interpreter for good: they wait in :func:`work` without holding the GIL, first spinning, then on a condition variable of
the C library.

One word of memory holds the state of the job at hand: a generation in its upper bits, whether the job may still be
joined, and how many workers have joined it. A worker joins by raising the count with compare-and-swap, so that none can
join a job that its caller has closed; the caller closes it when all parts are taken, and waits for those that joined.
A caller that finds the pool in use does its job alone.

Workers keep off the CPU that the caller is on (Linux only, and for small pools): woken for less than a millisecond, a
thread is often put on its waker's CPU, where it waits for the waker to finish, and nothing is won.
"""

import platform
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.ahead import bring_near, go_on, learn
from quantcore_backends.cpu_kernels.atomics import WORD, add_to_word, load_word, replaced, store_word
from quantcore_backends.cpu_kernels.disk_cache import CACHED, njit

__all__ = [
    "CPUS",
    "MOST_WORKERS",
    "POOL_BYTES",
    "call_kernel",
    "keep_apart",
    "look",
    "parallel",
    "prepare",
    "stop",
    "work",
]

MOST_WORKERS: Final = 255
CPUS: Final = 640
"""Where in a pool the bits of the CPUs that it may use stand: 128 bytes."""
POOL_BYTES: Final = 896 + (8 + 64) * (MOST_WORKERS + 1)
"""Bytes of a pool. It starts at a multiple of 64."""


# Byte offsets in a pool; what different threads write lies in cache lines of its own.
_STATE: Final = 0
_NEXT: Final = 64
_LEFT: Final = 128
_BUSY: Final = 192
_SLEEPERS: Final = 256
_STOP: Final = 264
_APART: Final = 272  # the CPU that workers keep off, and one
_JOB: Final = 320
_MUTEX: Final = 384
_CONDITION: Final = 512
_CPUS_LEFT: Final = 768
_WEIGHT: Final = 832  # the slot of the weight that was multiplied by last; see ahead.py
_THREADS: Final = 896  # system's numbers of the workers' threads; 0 ends them
_PLACES: Final = _THREADS + 8 * (MOST_WORKERS + 1)  # how far ahead each worker is: 64 bytes

_OPEN: Final = 1 << 16
_JOINED: Final = _OPEN - 1
_GENERATION: Final = 1 << 17

_SPINS: Final = 1000
"""Looks at the state before a caller yields."""
_LINUX: Final = platform.system() == "Linux"
_X86: Final = platform.machine().lower() in ("x86_64", "amd64")

_INT = ir.IntType(32)


@intrinsic
def call_kernel(typing: Any, function: Any, job: Any, thread: Any, first: Any, last: Any) -> Any:
    """Call a kernel by its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [WORD] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp, types.intp), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Leave the core to its other thread for a moment."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _library(name: str, count: int, exists: bool = True) -> Any:
    """A function of the C library that takes words and gives an int; -1 where there is no such function."""

    def typed(typing: Any, *addresses: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not exists:
                return ir.Constant(_INT, -1)
            kind = ir.FunctionType(_INT, [WORD] * count)
            called = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(called, args)

        return types.int32(*[types.intp] * count), generate

    if count == 0:
        return intrinsic(lambda typing: typed(typing))
    if count == 1:
        return intrinsic(lambda typing, one: typed(typing, one))
    if count == 2:
        return intrinsic(lambda typing, one, two: typed(typing, one, two))
    return intrinsic(lambda typing, one, two, three: typed(typing, one, two, three))


_mutex_init = _library("pthread_mutex_init", 2)
_mutex_lock = _library("pthread_mutex_lock", 1)
_mutex_unlock = _library("pthread_mutex_unlock", 1)
_condition_init = _library("pthread_cond_init", 2)
_condition_wait = _library("pthread_cond_wait", 2)
_condition_broadcast = _library("pthread_cond_broadcast", 1)
_yield = _library("sched_yield", 0)
_current_cpu = _library("sched_getcpu", 0, _LINUX)
_set_affinity = _library("sched_setaffinity", 3, _LINUX)


@njit(**CACHED)
def prepare(pool):
    """Make `POOL_BYTES` zeroed bytes a pool."""
    _mutex_init(pool + _MUTEX, 0)
    _condition_init(pool + _CONDITION, 0)


@njit(**CACHED)
def _wake(pool):
    _mutex_lock(pool + _MUTEX)
    _condition_broadcast(pool + _CONDITION)
    _mutex_unlock(pool + _MUTEX)


@njit(**CACHED)
def stop(pool):
    """Make the workers return."""
    store_word(pool + _STOP, 1)
    _wake(pool)


@njit(**CACHED)
def _sleep(pool, seen):
    """Wait until the generation isn't `seen` any more."""
    _mutex_lock(pool + _MUTEX)
    add_to_word(pool + _SLEEPERS, 1)
    while load_word(pool + _STATE) // _GENERATION == seen and load_word(pool + _STOP) == 0:
        _condition_wait(pool + _CONDITION, pool + _MUTEX)
    add_to_word(pool + _SLEEPERS, -1)
    _mutex_unlock(pool + _MUTEX)


@njit(**CACHED)
def _drain(pool, thread):
    """Do parts of the job until none is left."""
    function, job = load_word(pool + _JOB), load_word(pool + _JOB + 8)
    count, block = load_word(pool + _JOB + 16), load_word(pool + _JOB + 24)
    while True:
        first = add_to_word(pool + _NEXT, block)
        if first >= count:
            return
        call_kernel(function, job, thread, first, min(first + block, count))


@njit(**CACHED)
def look(pool, times):
    """What a waiting worker does, so many times: to find out how long it takes here."""
    spins = 0
    while load_word(pool + _STATE) // _GENERATION >= 0 and spins < times:
        spins += 1
        _pause()


@njit(**CACHED)
def work(pool, thread, workers, native, looks):
    """What a worker does all its life.

    `thread` is its number, from 1 to `workers`, and `native` the system's number of its thread, or 0 to leave it where
    it is. Before it sleeps, it looks `looks` times whether there is work; half as often after products of many rows,
    since NumPy's BLAS wants the cores between these.
    """
    store_word(pool + _THREADS + 8 * (thread - 1), native)
    seen, patience = np.int64(0), looks  # a literal 0 would be another type
    while load_word(pool + _STOP) == 0:
        spins = 0
        while load_word(pool + _STATE) // _GENERATION == seen and spins < patience:
            spins += 1
            _pause()
        state = load_word(pool + _STATE)
        if state // _GENERATION == seen:
            _sleep(pool, seen)
            continue
        if state & _OPEN == 0:
            seen = state // _GENERATION
        elif replaced(pool + _STATE, state, state + 1):
            seen = state // _GENERATION
            _drain(pool, thread)
            weight = load_word(pool + _WEIGHT)
            add_to_word(pool + _LEFT, 1)
            patience = looks if weight != 0 else looks // 2
            if weight != 0:
                place = pool + _PLACES + 64 * (thread - 1)
                go_on(place, weight)
                while load_word(pool + _STATE) // _GENERATION == seen and bring_near(place, thread - 1, workers):
                    pass


@njit(**CACHED)
def keep_apart(pool):
    """Keep the workers off the caller's CPU. Only who holds the pool may call it."""
    cpu = _current_cpu()
    if cpu < 0 or cpu >= 1024 or cpu + 1 == load_word(pool + _APART):
        return
    left = 0
    for word in range(16):
        bits = load_word(pool + CPUS + 8 * word)
        if cpu // 64 == word:
            bits &= ~(1 << (cpu % 64))
        left |= bits
        store_word(pool + _CPUS_LEFT + 8 * word, bits)
    index = 0
    while left != 0 and load_word(pool + _THREADS + 8 * index) != 0:
        _set_affinity(load_word(pool + _THREADS + 8 * index), 128, pool + _CPUS_LEFT)
        index += 1
    store_word(pool + _APART, cpu + 1)


@njit(**CACHED)
def parallel(pool, function, job, count, block, weight=0):
    """Call ``function(job, thread, first, last)`` on parts of ``range(count)``, some of them in the pool's threads.

    Parameters
    ----------
    pool : int
        Address of the pool; 0 for none.
    function : int
        Address of the kernel.
    job : int
        What the kernel takes as its first argument.
    count : int
    block : int
        Length of a part.
    weight : int
        The slot of the weight, in the table of :mod:`ahead`; 0 for none.
    """
    if pool == 0 or count <= block or not replaced(pool + _BUSY, 0, 1):
        call_kernel(function, job, 0, 0, count)
        return
    keep_apart(pool)
    store_word(pool + _JOB, function)
    store_word(pool + _JOB + 8, job)
    store_word(pool + _JOB + 16, count)
    store_word(pool + _JOB + 24, block)
    store_word(pool + _NEXT, 0)
    store_word(pool + _LEFT, 0)
    learn(load_word(pool + _WEIGHT), weight)
    store_word(pool + _WEIGHT, weight)
    generation = load_word(pool + _STATE) // _GENERATION + 1
    store_word(pool + _STATE, generation * _GENERATION + _OPEN)
    if load_word(pool + _SLEEPERS) > 0:
        _wake(pool)
    _drain(pool, np.int64(0))  # as the others are
    state = load_word(pool + _STATE)
    while not replaced(pool + _STATE, state, state - _OPEN):
        state = load_word(pool + _STATE)
    spins = 0
    while load_word(pool + _LEFT) != state & _JOINED:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _yield()
    store_word(pool + _BUSY, 0)
