"""The pool in compiled code: every part is done once, whoever calls, and no thread outlives its time."""

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from numba import cfunc

from quantcore_backends.cpu_kernels import pool
from quantcore_backends.cpu_kernels.job import KERNEL, addresses_at
from quantcore_backends.cpu_kernels.threads import NativePool


@cfunc(KERNEL)  # type: ignore[untyped-decorator]
def count(job: Any, thread: Any, first: Any, last: Any) -> None:
    """Raise each part's word of the job."""
    words = addresses_at(job, last)
    for part in range(first, last):
        words[part] += 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_part_is_done_once(threads: int) -> None:
    native = NativePool(threads)
    try:
        for parts in (1, 2, 7, 64, 1000):
            for block in (1, 3, 64):
                done = np.zeros(parts, np.int64)
                for _ in range(20):
                    pool.parallel(native.address, count.address, done.ctypes.data, parts, block)
                assert (done == 20).all()
    finally:
        native.stop()


def test_callers_at_the_same_time() -> None:
    native = NativePool(3)
    jobs = [np.zeros(500, np.int64) for _ in range(8)]

    def call(job: Any) -> None:
        for _ in range(200):
            pool.parallel(native.address, count.address, job.ctypes.data, 500, 7)

    callers = [threading.Thread(target=call, args=(job,)) for job in jobs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    native.stop()
    assert all((job == 200).all() for job in jobs)


def test_workers_that_sleep_are_woken() -> None:
    native = NativePool(2)
    done = np.zeros(64, np.int64)
    pause = threading.Event()
    for _ in range(20):
        pool.parallel(native.address, count.address, done.ctypes.data, 64, 1)
        pause.wait(0.005)
    native.stop()
    assert (done == 20).all()


_DOT = """
import threading, sys
import numpy as np, quantcore as qc
w = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
qw = qc.quantize(w)
x = np.ones((1, 1024), np.float32)
expected = qc.dot(x, qw)
def call():
    for _ in range(50):
        assert (qc.dot(x, qw) == expected).all()
callers = [threading.Thread(target=call) for _ in range(6)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
print("done")
"""


@pytest.mark.parametrize("layer", ["default", "workqueue", "omp", "tbb"])
def test_callers_under_any_threading_layer_of_numba(layer: str) -> None:
    """And the process ends, though its threads wait in compiled code."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer, "QUANTCORE_NUM_THREADS": "3"}
    command = [sys.executable, "-c", _DOT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
