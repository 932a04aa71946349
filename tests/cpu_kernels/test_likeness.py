"""Products keep their bound also with weights whose rows are alike, and with x whose roundings go one way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import independent_rows, products

Array = np.ndarray[Any, Any]

ROWS, COLUMNS = 256, 1024


def drawn(kind: str) -> Array:
    """A dense weight of random elements."""
    rng = np.random.default_rng(0)
    if kind == "rank one":
        return rng.standard_normal((ROWS, 1)) * rng.standard_normal((1, COLUMNS))
    random = rng.standard_normal((ROWS, COLUMNS))
    return {"zero mean": random, "mean 1": 1 + random, "uniform": rng.uniform(0, 1, (ROWS, COLUMNS))}[kind]


def quantized(kind: str) -> qc.QuantizedTensor:
    return qc.quantize(drawn(kind).astype(np.float32))


def count(qw: qc.QuantizedTensor) -> int:
    return independent_rows(*qw.flatten()[0], qw.scheme, qw.in_features)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("zero mean", ROWS, ROWS), ("mean 1", 2, 6), ("uniform", 1, 3), ("rank one", 1, 1)]
)
def test_rows_that_are_alike_count_less(kind: str, least: int, most: int) -> None:
    assert least <= count(quantized(kind)) <= most


def test_rows_that_cannot_be_compared_count_all() -> None:
    qw = quantized("uniform")
    for value in (np.nan, np.inf):
        scales = np.full_like(qw.scales, value)
        assert count(qc.quantized_tensor(qw.packed, scales, qw.biases, qw.shape, qw.scheme)) == ROWS
    assert count(qc.quantized_tensor(qw.packed, 0 * qw.scales, 0 * qw.biases, qw.shape, qw.scheme)) == ROWS
    assert count(qw[:1]) == 1


@pytest.mark.parametrize("kind", ["mean 1", "uniform", "rank one"])
@pytest.mark.parametrize("of_x", ["Gaussian", "Laplace", "outliers"])
def test_weights_whose_rows_are_alike_keep_the_bound(kind: str, of_x: str) -> None:
    qw, rng = quantized(kind), np.random.default_rng(1)
    x = {
        "Gaussian": rng.standard_normal((200, COLUMNS)),
        "Laplace": rng.laplace(size=(200, COLUMNS)),
        "outliers": np.where(rng.random((200, COLUMNS)) < 0.01, 20, 1) * rng.standard_normal((200, COLUMNS)),
    }[of_x].astype(np.float32)
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, COLUMNS)
    truth = oracle.product(x, exact)
    for precision in ("default", "fast"):
        many = qc.dot(x, qw, precision=precision)
        few = np.concatenate([qc.dot(row[None], qw, precision=precision) for row in x])
        for result in (many, few):
            assert oracle.nmse(result - truth, truth, x, exact) <= oracle.BOUNDS[precision]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("top", [127, 32767, 1 << 21])
def test_roundings_that_go_one_way_are_refused(top: int, library: str) -> None:
    qw = quantized("uniform")
    step = 1 / top
    x = np.where(np.arange(COLUMNS) % 2, 0.45 * step + 0.5, -0.55 * step - 0.5).astype(np.float32)
    x[::64], x[::128] = 1, -1
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, COLUMNS)
    for rows in (1, 6):
        some = np.repeat(x[None], rows, 0)
        truth = oracle.product(some, exact)
        for precision, bound in oracle.BOUNDS.items():
            result = np.asarray(qc.dot(qc.to_library(some, library), qw.to(library), precision=precision))
            assert oracle.nmse(result - truth, truth, some, exact) <= bound, (rows, precision)


def test_a_weight_that_is_made_anew_each_time_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(products, "independent_rows", lambda *leaves: looks.append(1) or independent_rows(*leaves))
    made = quantized("uniform")
    wide = qc.quantized_tensor(made.packed, made.scales.astype(np.float64), made.biases, made.shape, made.scheme)
    for _ in range(2):
        qc.dot(np.ones((1, COLUMNS), np.float32), wide, out_dtype="float32")
    assert looks == [1]
    assert id(wide) not in products._weights
