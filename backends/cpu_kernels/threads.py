"""Rows of a kernel spread over threads, whatever threading layer Numba has on the machine.

Numba's own parallel regions aren't used: under its default layer two Python threads that enter one abort the process.
The kernels release the GIL, so a small pool of Python threads does as well, and any number of callers may share it.
"""

import atexit
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

__all__ = ["NativePool", "native_pool", "over_rows", "thread_count"]

_OWN: Final = "QUANTCORE_NUM_THREADS"
_VARIABLES: Final = (_OWN, "NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
_FEW_CPUS: Final = 8
"""CPUs up to which the waiting threads keep off the caller's."""
_AWAKE: Final = 120e-6
"""Seconds that a worker waits awake: what a model does between two products, attention included. Waking one takes ten
microseconds, on a virtual machine more."""
_TRIED, _MOST_LOOKS = 1000, 100_000
_most_threads: int | None = None
"""Threads of the first native pool. Scratch memory is planned for so many, in a forked child too: none has more."""
_pool: ThreadPoolExecutor | None = None
_native: "NativePool | None" = None
_starting = threading.Lock()


def thread_count() -> int:
    """Threads that a product may use: the first of the variables above that is set, else the processors allowed."""
    for variable in _VARIABLES:
        value = os.environ.get(variable, "")
        if value.isascii() and value.isdigit() and int(value) > 0:
            return int(value)
        if value and variable == _OWN:
            warnings.warn(f"{_OWN}={value!r} is no number of threads and is ignored", RuntimeWarning, stacklevel=2)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def over_rows(kernel: Callable[[int, int], None], rows: int, work: int, least: int = 1 << 18) -> None:
    """Call ``kernel(first, last)`` on parts of ``range(rows)``, in threads where the work is worth it.

    Parameters
    ----------
    kernel : callable
        Releases the GIL.
    rows : int
    work : int
        Elements that the whole call goes through.
    least : int
        Elements worth a thread: handing a part to one costs some 20 µs.
    """
    parts = min(work // least, rows // 4)
    if parts > 1:
        parts = min(parts, thread_count())
    if parts <= 1:
        kernel(0, rows)
        return
    bounds = [rows * part // parts // 4 * 4 for part in range(parts)] + [rows]
    pool = _shared_pool()
    others = [pool.submit(kernel, bounds[part], bounds[part + 1]) for part in range(1, parts)]
    kernel(bounds[0], bounds[1])
    for other in others:
        other.result()


def native_pool() -> "NativePool":
    """The threads that wait in compiled code, started by the first call, which reads their number."""
    global _native, _most_threads
    if _native is None:
        with _starting:
            if _native is None:
                threads = thread_count()
                _most_threads = threads if _most_threads is None else _most_threads
                _native = NativePool(min(threads, _most_threads))
    return _native


class NativePool:
    """Memory of a pool of :mod:`pool`, and its threads.

    Attributes
    ----------
    address : int
        What the functions of :mod:`pool` take.
    threads : int
        With the caller's.
    """

    def __init__(self, threads: int) -> None:
        from quantcore_backends.cpu_kernels import pool

        self.threads = min(threads, pool.MOST_WORKERS + 1)
        self._compiled = pool
        memory = np.zeros(pool.POOL_BYTES + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self._memory = memory[start:]
        self.address = self._memory.ctypes.data
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for cpu in cpus:
            if cpu < 1024:
                self._memory[pool.CPUS + cpu // 8] |= 1 << cpu % 8
        apart = threads == len(cpus) <= _FEW_CPUS
        pool.prepare(self.address)
        looks = self._looks(_AWAKE) if self.threads > 1 else 0
        self._threads = [
            threading.Thread(target=self._work, args=(number, apart, looks), name=f"quantcore-{number}", daemon=True)
            for number in range(1, self.threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def _work(self, number: int, apart: bool, looks: int) -> None:
        self._compiled.work(self.address, number, self.threads - 1, threading.get_native_id() if apart else 0, looks)

    def _looks(self, seconds: float) -> int:
        """How often a worker can look for work in that time: a pause is 40 cycles here, 140 there, or none at all."""
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            self._compiled.look(self.address, _TRIED)
            taken.append(time.perf_counter() - start)
        return min(int(seconds / max(min(taken), 1e-9) * _TRIED), _MOST_LOOKS)

    def stop(self) -> None:
        """End the threads, before the interpreter takes down the code that they are in."""
        self._compiled.stop(self.address)
        for thread in self._threads:
            thread.join()


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, thread_count() - 1), thread_name_prefix="quantcore")
    return _pool


def _forget_pools() -> None:
    """Threads don't survive a fork, and a lock may have been held by one."""
    global _pool, _native, _starting
    if _native is not None:
        atexit.unregister(_native.stop)
    _pool, _native, _starting = None, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
