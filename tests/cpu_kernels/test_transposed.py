"""The kernel for products along the rows of a packed weight, against float64; called as a compiled body calls it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle

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
