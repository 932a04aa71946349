"""The MLX backend on a GPU: what its kernels give, and that what they can't do goes elsewhere.

Run with ``pytest -m gpu`` where MLX finds one. MLX compiles its CUDA kernels when first used, which takes tens of
seconds each; the cases are few for that reason.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(mx.default_device() == mx.cpu, reason="needs a GPU that MLX can use"),
    pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning"),
]

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((128, 512)).astype(np.float32)


def exact(qw: qc.QuantizedTensor) -> np.ndarray[Any, Any]:
    """The weight that a NumPy tensor stands for, in float64."""
    return oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)


def worst(result: Any, x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> float:
    """NMSE of the worst row."""
    wanted = oracle.product(x, w)
    return oracle.nmse(np.asarray(result.astype(mx.float32)).astype(np.float64) - wanted, wanted, x, w)


@pytest.mark.parametrize(("bits", "rows", "transposed"), [(4, 1, False), (4, 1, True), (4, 40, False), (8, 1, False)])
def test_products(bits: int, rows: int, transposed: bool) -> None:
    qw = qc.quantize(WEIGHT, bits=bits)
    w = exact(qw).T if transposed else exact(qw)
    x = RNG.standard_normal((rows, w.shape[1])).astype(np.float16).astype(np.float32)
    moved = qw.to("mlx").mT if transposed else qw.to("mlx")
    assert qc.explain("dot", mx.array(x), moved).backend == "mlx"
    assert worst(qc.dot(mx.array(x), moved), x, w) <= 1e-8


def test_one_bit_is_left_to_array_api_code_on_cuda() -> None:
    qw = qc.quantize(WEIGHT, bits=1)
    moved = qc.quantize(mx.array(WEIGHT), bits=1)
    np.testing.assert_array_equal(np.asarray(moved.packed), qw.packed)
    x = RNG.standard_normal((2, 512)).astype(np.float32)
    if mx.cuda.is_available():
        assert qc.explain("dot", mx.array(x), moved).backend == "array_api"
    assert worst(qc.dot(mx.array(x), moved), x, exact(qw)) <= 1e-8


def test_empty_x() -> None:
    assert qc.dot(mx.zeros((0, 512)), qc.quantize(mx.array(WEIGHT))).shape == (0, 128)


def test_dequantize_within_one_contraction_of_the_rule() -> None:
    qw = qc.quantize(WEIGHT)
    dense = np.asarray(qw.to("mlx").dequantize())
    np.testing.assert_allclose(dense, exact(qw), rtol=0, atol=2 * np.spacing(np.float32(np.abs(WEIGHT).max())))


def test_out_of_range_is_nan() -> None:
    rows = np.asarray(qc.take(qc.quantize(mx.array(WEIGHT)), mx.array([1, 200])))
    np.testing.assert_array_equal(np.isnan(rows).all(axis=1), [False, True])


def test_gather_and_broadcast() -> None:
    stack = RNG.standard_normal((2, 33, 256)).astype(np.float32)
    qw = qc.quantize(stack)
    x = RNG.standard_normal((4, 256)).astype(np.float32)
    result = qc.dot(mx.array(x), qw.to("mlx"))
    for index in range(2):
        assert worst(result[index], x, exact(qw)[index]) <= 1e-8
    gathered = qc.gather_dot(mx.array(x)[None], qw.to("mlx"), mx.array([0, 0]), mx.array([1, 0]))
    for place, index in enumerate((1, 0)):
        assert worst(gathered[place], x, exact(qw)[index]) <= 1e-8


def test_inside_compile_and_grad() -> None:
    qw = qc.quantize(mx.array(WEIGHT))
    x = mx.array(RNG.standard_normal((1, 512)).astype(np.float32))
    compiled = mx.compile(lambda x: qc.dot(x, qw))
    np.testing.assert_allclose(np.asarray(compiled(x)), np.asarray(qc.dot(x, qw)), rtol=1e-5, atol=1e-4)
    gradient = mx.grad(lambda x: qc.dot(x, qw).sum())(x)
    np.testing.assert_allclose(np.asarray(gradient)[0], np.asarray(qw.dequantize()).sum(axis=0), rtol=1e-3, atol=1e-3)
