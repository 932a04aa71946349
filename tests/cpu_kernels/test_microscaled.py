"""The compiled kernels of the microscaled modes: memory, other targets, without Numba; the kit judges the numbers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import compiled_microscaled

MODES = ("mxfp4", "mxfp8", "nvfp4")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows_of_x", [1, 2, 5])
def test_few_rows_within_the_bound_of_highest(rows_of_x: int, mode: str) -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 16), (7, 264), (5, 4100)):
        qw = qc.quantize(rng.standard_normal((rows, columns)).astype(np.float32), mode, pad=True)
        x = rng.standard_normal((rows_of_x, columns)).astype(np.float32)
        y = compiled_microscaled.few_rows(x, qw.packed, qw.scales, qw.scheme)
        exact = oracle.exact_weight(qw.packed, qw.scales, None, qw.scheme, columns)
        product = oracle.product(x, exact)
        assert oracle.nmse(y - product, product, x, exact) <= oracle.BOUNDS["highest"]


@pytest.mark.parametrize("mode", MODES)
def test_part_of_the_columns(mode: str) -> None:
    qw = qc.quantize(np.random.default_rng(0).standard_normal((9, 801)).astype(np.float32), mode, pad=True)
    part = compiled_microscaled.decode_block(qw.packed, qw.scales, qw.scheme, 256, 801)
    np.testing.assert_array_equal(part, qw.dequantize()[:, 256:])


@pytest.mark.parametrize("mode", MODES)
def test_rows_apart_in_memory(mode: str) -> None:
    qw = qc.quantize(np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32), mode)[::2]
    assert not qw.packed.flags.c_contiguous
    x = np.ones((1, 256), np.float32)
    np.testing.assert_allclose(qc.dot(x, qw), x @ qw.dequantize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("mode", MODES)
def test_no_byte_past_the_operands_is_read(mode: str, guard: str) -> None:
    """Each operand ends where an unreadable page begins: one byte too far ends the process."""
    script = f"""{guard}
from quantcore_backends.cpu_kernels import compiled_microscaled as kernels

for rows, columns in ((1, 16), (5, 24), (6, 264), (4, 1031)):
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    qw = qc.quantize(w, {mode!r}, pad=True)
    packed, scales = map(at_the_end, (qw.packed, qw.scales))
    for m in (1, 3):
        x = at_the_end(np.ones((m, columns), np.float32))
        y = kernels.few_rows(x, packed, scales, qw.scheme)
        np.testing.assert_allclose(y, x @ qw.dequantize().T, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(kernels.decode_block(packed, scales, qw.scheme, 0, columns), qw.dequantize())
print("read nothing else")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "read nothing else\n", done.stderr[-2000:]


_SAME = """
import sys
if {without_numba}:
    sys.modules["numba"] = None
import numpy as np, quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import compiled
assert compiled.available() is not {without_numba}
rng = np.random.default_rng(0)
for mode in {modes}:
    scheme = qc.Scheme(mode)
    w = rng.standard_normal((9, 264)).astype(np.float32)
    qw = qc.quantize(w, scheme, pad=True)
    wanted = oracle.encode(w, scheme)
    np.testing.assert_array_equal(qw.packed, wanted[0])
    np.testing.assert_array_equal(qw.scales, wanted[1])
    np.testing.assert_array_equal(qw.dequantize(), oracle.dequantize(*wanted, scheme, 264, "float32"))
    exact = oracle.exact_weight(*wanted, scheme, 264)
    for rows in (1, 3, 20):
        x = rng.standard_normal((rows, 264)).astype(np.float32)
        y = oracle.product(x, exact)
        assert oracle.nmse(qc.dot(x, qw) - y, y, x, exact) <= 1e-12
print("the same")
"""


@pytest.mark.parametrize("cpu", ["generic", pytest.param("x86-64-v3", marks=pytest.mark.slow)])
def test_other_targets_give_the_same(cpu: str, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    _run(_SAME.format(without_numba=False, modes=MODES), environment)


def test_without_numba_the_numpy_code_answers() -> None:
    _run(_SAME.format(without_numba=True, modes=MODES), dict(os.environ))


def _run(script: str, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr[-2000:]
