"""A parallel loop on XLA's own threads.

Numba's parallel regions can't be used: their default layer aborts when two threads enter one, and none survives a
fork. Here each thread, the caller among them, takes the next chunk until none is left, so that the loop ends even if no
other thread ever comes; whoever is last to let go of the shared state frees it.
"""

from numba import types

from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, cfunc, njit
from quantcore_backends.jax_backend.ffi.abi import OFFSETS
from quantcore_backends.jax_backend.ffi.frame import (
    TABLE,
    atomic_add,
    call,
    call2,
    free,
    load64,
    malloc,
    store64,
    table,
    yield_processor,
)

__all__ = ["for_chunks", "install", "wait"]

_API, _CTX = OFFSETS["CallFrame.api"], OFFSETS["CallFrame.ctx"]
_DESTROY = OFFSETS["Api.XLA_FFI_Error_Destroy"]
_SCHEDULE = OFFSETS["Api.XLA_FFI_ThreadPool_Schedule"]
_NUM_THREADS = OFFSETS["Api.XLA_FFI_ThreadPool_NumThreads"]

# The shared state: the next chunk, chunks done, who holds the state, how many chunks, the body and its operands.
_NEXT, _DONE, _HELD, _CHUNKS, _BODY, _OPERANDS = 0, 64, 128, 192, 200, 208
_STATE = 216
_SPINS = 2000


@njit(**CACHED)
def _drain(state):
    chunks, body, operands = load64(state + _CHUNKS), load64(state + _BODY), load64(state + _OPERANDS)
    chunk = atomic_add(state + _NEXT, 1)
    while chunk < chunks:
        call2(body, chunk, operands)
        atomic_add(state + _DONE, 1)
        chunk = atomic_add(state + _NEXT, 1)


@njit(**CACHED)
def wait(address, count):
    """Wait until a number that threads count up is so large."""
    spins = 0
    while atomic_add(address, 0) < count:
        spins += 1
        if spins > _SPINS:
            yield_processor()


@njit(**INLINED)
def _let_go(state):
    if atomic_add(state + _HELD, -1) == 1:
        free(state)


@cfunc(types.void(types.int64), cache=True)
def _task(state):
    _drain(state)
    _let_go(state)


@njit(**CACHED)
def _destroy(api, error):
    args = malloc(24)
    if args != 0:
        store64(args, 24)
        store64(args + 8, 0)
        store64(args + 16, error)
        call(load64(api + _DESTROY), args)
        free(args)


@njit(**CACHED)
def _threads(frame):
    """Threads of the pool; 1 where it can't say."""
    args = malloc(40)
    if args == 0:
        return 1
    store64(args, 32)
    store64(args + 8, 0)
    store64(args + 16, load64(frame + _CTX))
    store64(args + 24, args + 32)
    store64(args + 32, 1)
    failed = call(load64(load64(frame + _API) + _NUM_THREADS), args)
    count = load64(args + 32)
    free(args)
    if failed != 0:
        _destroy(load64(frame + _API), failed)
        return 1
    return count


@njit(**CACHED)
def for_chunks(frame, body, operands, chunks):
    """Call ``body(chunk, operands)`` for every chunk; False where there is no memory for it."""
    others = min(_threads(frame), load64(table() + 16), chunks) - 1
    if others <= 0:
        for chunk in range(chunks):
            call2(body, chunk, operands)
        return True
    state, args = malloc(_STATE), malloc(40)
    if state == 0 or args == 0:
        free(state)
        free(args)
        return False
    store64(state + _NEXT, 0)
    store64(state + _DONE, 0)
    store64(state + _HELD, 1 + others)
    store64(state + _CHUNKS, chunks)
    store64(state + _BODY, body)
    store64(state + _OPERANDS, operands)
    api = load64(frame + _API)
    store64(args, 40)
    store64(args + 8, 0)
    store64(args + 16, load64(frame + _CTX))
    store64(args + 24, load64(table() + 24))
    store64(args + 32, state)
    for _ in range(others):
        failed = call(load64(api + _SCHEDULE), args)
        if failed != 0:
            _destroy(api, failed)
            atomic_add(state + _HELD, -1)
    free(args)
    _drain(state)
    wait(state + _DONE, chunks)
    _let_go(state)
    return True


def install(threads: int) -> None:
    """Put the pool's entries into the table."""
    TABLE[2] = threads
    TABLE[3] = _task.address
