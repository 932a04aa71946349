"""The compiled kernels agree with the NumPy ones, read no byte past their operands, and survive threads and fork."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcore as qc
from quantcore import Scheme
from quantcore.scheme import BITS, GROUP_SIZES
from quantcore_backends.cpu_kernels import compiled, threads, weights

Array = np.ndarray[Any, Any]
SCHEMES = [Scheme("affine", bits, group) for bits in BITS for group in (*GROUP_SIZES, None)]


@pytest.fixture(autouse=True)
def _needs_numba() -> None:
    assert compiled.available(), "the extra `fast` belongs to the test set-up"


def weight(rows: int, columns: int, scheme: Scheme, dtype: Any = np.float32) -> qc.QuantizedTensor:
    rng = np.random.default_rng(rows * columns + scheme.bits)
    return qc.quantize(rng.standard_normal((rows, columns)).astype(dtype), scheme, pad=True)


def reference(qw: qc.QuantizedTensor) -> Array:
    """The NumPy decoder's answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "available", lambda: False)
        dense: Array = weights.decode(qw.flatten()[0], qw.scheme, qw.in_features, np.dtype(np.float32))
    return dense


def nmse(result: Array, x: Array, dense: Array) -> float:
    exact = x.astype(np.float64) @ dense.astype(np.float64).T
    spread = (x.astype(np.float64) ** 2).sum(1) * (dense.astype(np.float64) ** 2).sum() / x.shape[1]
    worst: float = (((result - exact) ** 2).sum(1) / np.maximum((exact**2).sum(1), spread)).max()
    return worst


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dense_weight_is_bit_equal_to_numpys(scheme: Scheme, dtype: Any) -> None:
    for rows, columns in ((1, 16), (7, 264), (3, 1031)):
        qw = weight(rows, columns, scheme, dtype)
        decoded = compiled.decode_block(qw.packed, qw.scales, qw.biases, scheme, 0, columns)
        np.testing.assert_array_equal(decoded, reference(qw))


@pytest.mark.parametrize("bits", BITS)
def test_columns_from_the_middle(bits: int) -> None:
    scheme = Scheme("affine", bits, 32)
    qw = weight(5, 1024, scheme)
    decoded = compiled.decode_block(qw.packed, qw.scales, qw.biases, scheme, 256, 801)
    np.testing.assert_array_equal(decoded, reference(qw)[:, 256:801])


@pytest.mark.parametrize("rows_of_x", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_few_rows_within_the_bound_of_highest(scheme: Scheme, rows_of_x: int) -> None:
    rng = np.random.default_rng(rows_of_x)
    for rows, columns in ((1, 16), (6, 264), (9, 1031), (33, 4096)):
        qw = weight(rows, columns, scheme)
        x = rng.standard_normal((rows_of_x, columns)).astype(np.float32)
        x[:, ::97] *= 1000
        result = compiled.few_rows(x, qw.packed, qw.scales, qw.biases, scheme)
        assert result.shape == (rows_of_x, rows)
        assert nmse(result, x, reference(qw)) <= 1e-12


@pytest.mark.parametrize("columns", [14336, 131072])
def test_error_does_not_grow_with_the_length_of_the_rows(columns: int) -> None:
    scheme = Scheme("affine", 8, None)
    qw = weight(3, columns, scheme)
    x = np.random.default_rng(0).standard_normal((1, columns)).astype(np.float32)
    assert nmse(compiled.few_rows(x, qw.packed, qw.scales, qw.biases, scheme), x, reference(qw)) <= 1e-12


def test_rows_apart_in_memory_are_read_in_place() -> None:
    qw = weight(16, 512, Scheme("affine", 4, 64))[::2]
    assert not qw.packed.flags.c_contiguous
    x = np.ones((1, 512), np.float32)
    np.testing.assert_allclose(qc.dot(x, qw), x @ reference(qw).T, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs mprotect")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_byte_past_the_operands_is_read(scheme: Scheme, guard: str) -> None:
    """Each operand ends where an unreadable page begins: one byte too far ends the process."""
    script = f"""{guard}
from quantcore_backends.cpu_kernels import compiled

scheme = qc.Scheme.parse({str(scheme)!r})
for rows, columns in ((1, 16), (5, 24), (6, 264), (4, 1031)):
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    qw = qc.quantize(w, scheme, pad=True)
    packed, scales, biases = map(at_the_end, (qw.packed, qw.scales, qw.biases))
    for m in (1, 3):
        x = at_the_end(np.ones((m, columns), np.float32))
        y = compiled.few_rows(x, packed, scales, biases, scheme)
        np.testing.assert_allclose(y, x @ qw.dequantize().T, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(compiled.decode_block(packed, scales, biases, scheme, 0, columns), qw.dequantize())
print("read nothing else")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "read nothing else\n", done.stderr[-2000:]


def test_many_callers_at_once() -> None:
    qw = weight(2048, 512, Scheme("affine", 4, 64))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((1 + i % 3, 512)).astype(np.float32) for i in range(64)]
    expected = [qc.dot(x, qw) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for result, wanted in zip(pool.map(lambda x: qc.dot(x, qw), xs), expected, strict=True):
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork() -> None:
    qw = weight(2048, 512, Scheme("affine", 4, 64))
    x = np.ones((1, 512), np.float32)
    expected = qc.dot(x, qw)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(qc.dot, (x, qw)).get(timeout=60)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"QUANTCORE_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "5"}, 4),
        ({"OMP_NUM_THREADS": "5"}, 5),
        (
            {"OMP_NUM_THREADS": "0", "NUMBA_NUM_THREADS": "many"},
            len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        ),
    ],
)
def test_thread_count(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], count: int) -> None:
    for name in ("QUANTCORE_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert threads.thread_count() == count


def test_rows_are_covered_once_whatever_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 7):
        monkeypatch.setenv("QUANTCORE_NUM_THREADS", str(count))
        for rows in (1, 3, 4, 5, 8, 17, 64):
            seen = np.zeros(rows, int)

            def visit(first: int, last: int, seen: Array = seen) -> None:
                seen[first:last] += 1

            threads.over_rows(visit, rows, work=1 << 30)
            assert (seen == 1).all()


@pytest.mark.parametrize("features", ["generic", pytest.param("x86-64-v3", marks=pytest.mark.slow)])
def test_other_targets_give_the_same(features: str, tmp_path: Any) -> None:
    """Code for a lesser processor: the vectors are split, the results are the same."""
    script = """
import numpy as np, quantcore as qc
from quantcore_backends.cpu_kernels import compiled, simd
rng = np.random.default_rng(0)
for bits in (1, 3, 4, 8):
    qw = qc.quantize(rng.standard_normal((9, 264)).astype(np.float32), bits=bits, group_size=16, pad=True)
    x = rng.standard_normal((3, 264)).astype(np.float32)
    y = compiled.few_rows(x, qw.packed, qw.scales, qw.biases, qw.scheme)
    np.testing.assert_allclose(y, x @ qw.dequantize().T, rtol=1e-4, atol=1e-3)
print(simd.LANES)
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": features, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr[-2000:]


@pytest.mark.parametrize("op", ["dot", "dequantize"])
def test_without_numba_the_numpy_kernels_answer(op: str) -> None:
    script = f"""
import sys
sys.modules["numba"] = None
import numpy as np, quantcore as qc
from quantcore_backends.cpu_kernels import compiled
assert not compiled.available()
w = np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
qw = qc.quantize(w)
y = qc.dot(np.ones((1, 256), np.float32), qw) if {op!r} == "dot" else qc.dequantize(qw)
print(y.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == ("(1, 9)\n" if op == "dot" else "(9, 256)\n"), done.stderr[-2000:]


def test_importing_the_backend_does_not_import_numba() -> None:
    script = "import sys, quantcore_backends.numpy_backend; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
