"""Rows of a kernel spread over threads, whatever threading layer Numba has on the machine.

Numba's own parallel regions aren't used: under its default layer two Python threads that enter one abort the process.
The kernels release the GIL, so a small pool of Python threads does as well, and any number of callers may share it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

__all__ = ["over_rows", "thread_count"]

_VARIABLES: Final = ("QUANTCORE_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
_pool: ThreadPoolExecutor | None = None


def thread_count() -> int:
    """Threads that a product may use: the first of the variables above that is set, else the processors allowed."""
    for variable in _VARIABLES:
        value = os.environ.get(variable, "")
        if value.isascii() and value.isdigit() and int(value) > 0:
            return int(value)
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


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, thread_count() - 1), thread_name_prefix="quantcore")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None  # threads don't survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
