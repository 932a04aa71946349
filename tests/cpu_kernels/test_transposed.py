"""The kernel for products along the rows of a packed weight, against float64: as compiled bodies call it, and NumPy."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import compiled, products

transposed = pytest.importorskip("quantcore_backends.cpu_kernels.transposed")


def product(x: Any, qw: qc.QuantizedTensor, parts: int) -> Any:
    packed, scales, biases = (np.ascontiguousarray(leaf) for leaf in qw.flatten()[0])
    rows, columns = qw.shape
    span = qw.scheme.group_size or 256
    spans = -(-columns // span)
    padded = np.concatenate([packed.reshape(-1), np.zeros(4, np.uint32)])
    out = np.full((x.shape[0], columns), np.nan, np.float32)
    kernel = transposed.rows_by_few(qw.scheme.bits, 0)
    bounds = np.linspace(0, spans, parts + 1).astype(int)
    for first, last in pairwise(bounds):
        narrow = np.empty(x.shape[0] * ((last - first) * span + 4), np.float32)
        wide = np.empty(x.shape[0] * (last - first), np.float64)
        where = padded.ctypes.data, padded.ctypes.data, rows, scales.ctypes.data, biases.ctypes.data
        strides = packed.strides[0], scales.strides[0], 4 if qw.scheme.group_size else 0
        of_x = x.ctypes.data, x.strides[0], x.shape[0]
        kernel(*of_x, *where, out, narrow, wide, first, last, rows, columns, span, *strides)
    return out


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(
    ("scheme", "shape", "parts"),
    [
        ("affine-int4-g64", (1000, 192), 3),
        ("affine-int1-g16", (7, 48), 2),
        ("affine-int3-g32", (257, 77), 2),
        ("affine-int5-g128", (1, 256), 1),
        ("affine-int8-row", (514, 600), 2),
        ("affine-int6-row", (3, 5), 1),
    ],
)
def test_it_keeps_to_the_bound_of_highest(
    scheme: str, shape: tuple[int, int], parts: int, offset: int, rows: int
) -> None:
    random = np.random.default_rng(0)
    qw = qc.quantize(random.standard_normal(shape).astype(np.float32), scheme, pad=True)
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, shape[1]).T
    x = (random.standard_normal((rows, shape[0])) + offset).astype(np.float32)
    true = oracle.product(x, exact)
    assert oracle.nmse(product(x, qw, parts) - true, true, x, exact) <= oracle.BOUNDS["highest"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", ["affine-int4-g64", "affine-int1-g16", "affine-int3-g32", "affine-int6-row"])
@pytest.mark.parametrize("rows", [1, compiled.FEW_ROWS])
def test_numpy_multiplies_few_rows_by_it(rows: int, scheme: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(rows)
    qw = qc.quantize(random.standard_normal((300, 1031)).astype(dtype), scheme, pad=True)
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, 1031).T
    x = random.standard_normal((rows, 300)).astype(np.float32)
    true = oracle.product(x, exact)
    monkeypatch.setattr(products, "_against_rows", None)  # what makes tiles of the weight dense
    for precision in ("default", "fast"):
        result = qc.matmul(x, qw, precision=precision)
        assert oracle.nmse(result - true, true, x, exact) <= oracle.BOUNDS["highest"]


@pytest.mark.parametrize("exponents", [(-140, 0), (-100, 90), (120, -100), (0, -120), (0, 20)], ids=str)
def test_x_and_scales_that_are_tiny_or_huge(exponents: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    qw = qc.quantize(random.standard_normal((300, 192)).astype(np.float32))
    scales, biases = (np.ldexp(leaf, exponents[1]) for leaf in (qw.scales, qw.biases))
    qw = qc.quantized_tensor(qw.packed, scales, biases, qw.shape, qw.scheme)
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, 192).T
    x = np.stack([random.standard_normal(300), np.ldexp(random.standard_normal(300), exponents[0])]).astype(np.float32)
    true = oracle.product(x, exact)
    result = qc.matmul(x, qw)
    assert np.isfinite(result).all()
    visible = np.abs(true).max(axis=1) > 1e-36  # of smaller results float32 loses digits
    assert visible[0]
    error = oracle.nmse((result - true)[visible], true[visible], x[visible], exact)
    assert error <= oracle.BOUNDS["highest"]


def test_what_is_not_finite_stays_where_it_is() -> None:
    qw = qc.quantize(np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32), group_size=32)
    x = np.ones((3, 40), np.float32)
    x[1, 7] = np.inf
    result = qc.matmul(x, qw)
    np.testing.assert_array_equal(np.isfinite(result), [[True] * 96, [False] * 96, [True] * 96])
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result, x @ qw.dequantize(), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["affine-int3-g16", "affine-int4-g64", "affine-int5-g32"])
def test_no_byte_past_the_operands_is_read(scheme: str, guard: str) -> None:
    script = f"""{guard}
from quantcore_backends.cpu_kernels import compiled

scheme = qc.Scheme.parse({scheme!r})
for rows, columns in ((1, 16), (5, 24), (6, 264), (4, 1031)):
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    qw = qc.quantize(w, scheme, pad=True)
    leaves = [at_the_end(leaf) for leaf in qw.flatten()[0]]
    for of_x in (1, 3):
        x = at_the_end(np.ones((of_x, rows), np.float32))
        y = compiled.few_rows_along(x, *leaves, scheme, columns)
        np.testing.assert_allclose(y, x @ qw.dequantize(), rtol=1e-3, atol=1e-3)
    repeated = [np.broadcast_to(at_the_end(leaf[:1]), leaf.shape) for leaf in qw.flatten()[0]]
    same = qc.QuantizedTensor(*repeated, scheme, columns).dequantize()
    y = compiled.few_rows_along(np.ones((2, rows), np.float32), *repeated, scheme, columns)
    np.testing.assert_allclose(y[1], same.sum(0), rtol=1e-3, atol=1e-3)
    x = np.ones((2, columns), np.float32)
    np.testing.assert_allclose(compiled.few_rows(x, *repeated, scheme), x @ same.T, rtol=1e-3, atol=1e-3)
print("read nothing else")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "read nothing else\n", done.stderr[-2000:]
