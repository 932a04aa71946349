"""What `quantcore.dot` costs over the kernel that it calls, on inputs so small that little else is left.

For each array library the same product is made through quantcore and by calling the backend's `dot` directly, in
turns; the overhead is the difference. A null backend, whose `dot` returns x, isolates it. Beside it: one
``np.matmul`` of 1x1, `x @ qw.mT`, first calls, and `import quantcore` on top of NumPy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from common import interleaved, print_table, save, shown, spread

import quantcore
from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl

MICRO, MILLI = 1e6, 1e3

WARM = {
    "dot(x, qw)": "dot(x, qw)",
    "dot(x, qw, backend=...)": "dot(x, qw, backend=name)",
    "dot(x, qw, out_dtype=...)": "dot(x, qw, out_dtype='float32')",
    "m = qw.mT; matmul(x, m)": "matmul(x, m)",
    "m = qw.mT; x @ m": "x @ m",
    "x @ qw.mT": "x @ qw.mT",
}
KERNEL = "kernel(x, qw, 'float32', 'default')"

IMPORT = "import {before}; import time; t = time.perf_counter(); import quantcore; print(time.perf_counter() - t)"
FIRST_EVER = """
import time, numpy as np, quantcore
qw = quantcore.quantized_tensor(np.zeros((1, 8), np.uint32), np.ones((1, 1), np.float32), np.ones((1, 1), np.float32),
                                (1, 64), "affine-int4-g64")
x = np.ones((1, 64), np.float32)
t = time.perf_counter(); quantcore.dot(x, qw); print(time.perf_counter() - t)
"""


class NullBackend:
    """Takes the arrays of a library and computes nothing."""

    def __init__(self, name: str, array_type: str = "numpy:ndarray", shape_dependent: bool = False) -> None:
        self.info = BackendInfo(
            api_version=1,
            name=name,
            library=array_type.partition(".")[0].partition(":")[0],
            array_types=(array_type,),
            priority=1000,
            shape_dependent=shape_dependent,
        )

    @hookimpl
    def backend_info(self) -> BackendInfo:
        return self.info

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        return op == "dot" or "computes nothing"

    @hookimpl
    def quantize(self, w: Any, scheme: Scheme) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Any:
        raise NotImplementedError

    @hookimpl
    def dot(self, x: Any, qw: QuantizedTensor, dtype: str, precision: str) -> Any:
        return x


@contextmanager
def registered(backend: NullBackend) -> Iterator[NullBackend]:
    """The null backend, taking its library's calls inside the block only."""
    quantcore.register(backend)
    try:
        yield backend
    finally:
        quantcore.unregister(backend.info.name)


def overheads(
    name: str, kernel: Callable[..., Any], operands: tuple[Any, Any], calls: Mapping[str, str], options: Any
) -> list[dict[str, Any]]:
    """What each call costs over the kernel alone, in µs, and as a ratio to a 1x1 np.matmul made in between."""
    x, qw = operands
    names = {
        "dot": quantcore.dot,
        "matmul": quantcore.matmul,
        "kernel": kernel,
        "np_matmul": np.matmul,
        "one": np.ones((1, 1), np.float32),
        "name": name,
        "x": x,
        "qw": qw,
        "m": qw.mT,
    }
    statements = {"kernel": KERNEL, "np.matmul 1x1": "np_matmul(one, one)", **calls}
    timers = {label: timeit.Timer(statement, globals=names).timeit for label, statement in statements.items()}
    taken = interleaved(timers, options.repeats, options.seconds)
    found = []
    for label in calls:
        over = [through - alone for through, alone in zip(taken[label], taken["kernel"], strict=True)]
        ratios = [extra / dense for extra, dense in zip(over, taken["np.matmul 1x1"], strict=True)]
        found.append(
            {
                "backend": name,
                "call": label,
                "kernel_us": spread(taken["kernel"], MICRO),
                "call_us": spread(taken[label], MICRO),
                "overhead_us": spread(over, MICRO),
                "np_matmul_1x1_us": spread(taken["np.matmul 1x1"], MICRO),
                "overhead_per_np_matmul": spread(ratios),
            }
        )
    return found


def first_of_its_kind(x: Any, qw: QuantizedTensor, repeats: int) -> dict[str, float]:
    """A call whose route isn't known yet, in µs: every change of the backends empties the table of routes."""
    taken = []
    for _ in range(repeats):
        with registered(NullBackend("null")):
            start = time.perf_counter()
            quantcore.dot(x, qw)
            taken.append(time.perf_counter() - start)
    return spread(taken, MICRO)


def in_subprocesses(code: str, repeats: int) -> dict[str, float]:
    """Milliseconds that `code` prints, each time in a fresh interpreter that finds bytecode, as after an install."""
    command = [sys.executable, "-c", code]
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        runs = [
            subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout
            for _ in range(repeats + 1)
        ]
    return spread([float(text) for text in runs[1:]], MILLI)


def imports(repeats: int) -> dict[str, dict[str, float]]:
    """`import quantcore` on top of NumPy, and how much of that isn't its dependencies'."""
    return {
        "import quantcore, on top of numpy": in_subprocesses(IMPORT.format(before="numpy"), repeats),
        "import quantcore, on top of its dependencies": in_subprocesses(
            IMPORT.format(before="numpy, ml_dtypes, pluggy, array_api_compat"), repeats
        ),
    }


def tiny() -> tuple[Any, QuantizedTensor]:
    """One row of x, one row of a weight."""
    return np.ones((1, 64), np.float32), quantcore.quantize(np.linspace(-1, 1, 64, dtype=np.float32)[None])


def measure(options: Any) -> list[dict[str, Any]]:
    """All the overheads: of the null backends, of NumPy's, of MLX's where it is installed."""
    x, qw = tiny()
    dot = {"dot(x, qw)": WARM["dot(x, qw)"]}
    with registered(NullBackend("null")) as null:
        found = overheads("null", null.dot, (x, qw), WARM, options)
    with registered(NullBackend("null-by-shape", shape_dependent=True)) as null:
        found += overheads("null-by-shape", null.dot, (x, qw), dot, options)
    operator = {**dot, "x @ qw.mT": WARM["x @ qw.mT"]}
    found += overheads("numpy", _loaded("numpy_backend").dot, (x, qw), operator, options)
    if any(record.name == "mlx" and record.state == "READY" for record in quantcore.backends()):
        operands = (quantcore.to_library(x, "mlx"), qw.to("mlx"))
        with registered(NullBackend("null-on-mlx", "mlx.core:array", shape_dependent=True)) as null:
            found += overheads("null-on-mlx", null.dot, operands, dot, options)
        found += overheads("mlx", _loaded("mlx_backend").dot, operands, dot, options)
    return found


def _loaded(module: str) -> Any:
    return __import__(f"quantcore_backends.{module}", fromlist=["backend"]).backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31, help="measurements of each call (default 31)")
    parser.add_argument("--seconds", type=float, default=0.02, help="length of one measurement (default 0.02)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()

    found = measure(options)
    headings = ("backend", "call", "kernel alone, µs", "overhead, µs", "overhead / np.matmul 1x1")
    rows = [
        (f["backend"], f["call"], *(shown(f[key]) for key in ("kernel_us", "overhead_us", "overhead_per_np_matmul")))
        for f in found
    ]
    print_table("Overhead over calling the bound kernel, 1x64 by 1x64: median (min-max)", headings, rows)
    if any(f["backend"] == "mlx" for f in found):
        print("\nmlx: the lazy graph is built and dropped, not evaluated")

    w = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    first = {
        "first dot of its kind, null backend, µs": first_of_its_kind(
            np.ones((1, 64), np.float32), quantcore.quantize(w), 31
        ),
        "first dot of the process, NumPy, ms": in_subprocesses(FIRST_EVER, 11),
    }
    print_table("First calls", ("", "median (min-max)"), [(label, shown(value)) for label, value in first.items()])
    imported = imports(11)
    rows = [(label, shown(value)) for label, value in imported.items()]
    print_table("Imports, ms", ("", "median (min-max)"), rows)
    dense = statistics.median(f["np_matmul_1x1_us"]["median"] for f in found)
    print(f"\nnp.matmul of 1x1: {dense:.3g} µs")
    if not options.no_save:
        save("dispatch", {"warm": found, "first": first, "imports_ms": imported})


if __name__ == "__main__":
    main()
