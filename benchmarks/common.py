"""What the benchmarks share: interleaved timing, tables, the machine's name, the results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOAD_BEFORE = os.getloadavg()[0]
"""Processes that ran or waited in the last minute before the benchmark."""
BUSY = 0.5

_PACKAGES = (
    "quantcore-arrays",
    "numpy",
    "numba",
    "torch",
    "torchao",
    "bitsandbytes",
    "jax",
    "jaxlib",
    "qwix",
    "mlx",
    "mlx-cpu",
    "array-api-compat",
    "pluggy",
    "ml_dtypes",
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def interleaved(
    calls: Mapping[str, Callable[[int], object]],
    repeats: int,
    seconds: float,
    pause: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each of `calls`, measured in turns of shuffled order.

    So a slow spell of the machine hits all alike, and no call always follows the same other one: what ran before it
    moves a call of 50 µs by a fifth.

    Parameters
    ----------
    calls : mapping of str to callable
        Each runs what it measures as many times as its argument says.
    repeats : int
    seconds : float
        How long one measurement should last; a call that takes longer is made once.
    pause : callable, optional
        Called before each measurement, outside of it: see :func:`settle`.
    """
    counts = {}
    for name, call in calls.items():
        pause()
        counts[name] = _count(call, seconds)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for _ in range(repeats):
        shuffler.shuffle(order)
        for name in order:
            pause()
            taken[name].append(_timed(calls[name], counts[name]) / counts[name])
    return taken


def settle(limit: float = 0.2) -> None:
    """Sleep until this process's threads sleep too.

    Those of OpenBLAS and ONNX Runtime go on looking for work for some 50 ms after a call, and would take CPUs from
    whoever is measured next.
    """
    quiet, end = 0, time.perf_counter() + limit
    while quiet < 3 and time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        busy = (time.process_time() - used) / (time.perf_counter() - start)
        quiet = quiet + 1 if busy < 0.2 else 0


def _count(call: Callable[[int], object], seconds: float) -> int:
    """How often to make a call so that it lasts about that long; the first calls may be loading something."""
    call(1)
    count = 1
    while True:
        took = min(_timed(call, count), _timed(call, count))
        if took >= seconds / 4:
            return max(1, round(count * seconds / took))
        count *= 4


def _timed(call: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    call(count)
    return time.perf_counter() - start


def repeated(function: Callable[[], object]) -> Callable[[int], None]:
    """`function` as `interleaved` wants it; for calls that take much longer than the loop around them."""

    def run(count: int) -> None:
        for _ in range(count):
            function()

    return run


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, least and most, multiplied by `scale`."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value * scale:.4g}") for name, value in found.items()}


def shown(found: Mapping[str, float]) -> str:
    """A spread for the table: median (min-max)."""
    return f"{found['median']:.3g} ({found['min']:.3g}-{found['max']:.3g})"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text under their headings, the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (headings, *rows)) for i in range(len(headings))]
    print(f"\n{title}\n")
    for line in (headings, ["-" * width for width in widths], *rows):
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def save(name: str, results: Mapping[str, Any]) -> None:
    """Write results/NAME.json, with the machine and the versions that they are from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")
    if LOAD_BEFORE > BUSY:
        print(f"the machine was busy (load {LOAD_BEFORE:.1f} at the start): don't quote these figures")


def machine() -> dict[str, Any]:
    """CPU, system, versions, date."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "load_before": round(LOAD_BEFORE, 2),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The CPU's name, with its vector extensions where the system lists them."""
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
    extensions = " ".join(flag for flag in wanted if flag in flags)
    family = ", ".join(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{facts.get('model name', platform.machine())} ({family}; {extensions})"
