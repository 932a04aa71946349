"""Every function of EMLX.Quantization has its counterpart here, and a test that is named for it.

EMLX is Nx on MLX for Elixir. Its module offers quantize, dequantize, quantized?, quantized_matmul, quantized_tensor,
from_dense, and an Nx.dot that recognises quantized operands. Its limits are tested here as what they no longer are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import quantcore as qc
from quantcore import QuantizedTensor

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")

RNG = np.random.default_rng(7)
W = RNG.standard_normal((96, 64)).astype(np.float32)  # (out, in)
X = RNG.standard_normal((2, 5, 64)).astype(np.float32)
SCHEMES = [(bits, group) for bits in (2, 4, 8) for group in (32, 64)]
EXTENDED = [*SCHEMES, (1, 32), (3, 64), (5, 32), (6, 64), (4, 16)]


@pytest.fixture(scope="module", params=["mlx", "numpy"])
def both(request: pytest.FixtureRequest, libraries: dict[str, Any]) -> Any:
    """MLX, which EMLX runs on, and NumPy."""
    return libraries[request.param]


def exact(qw: QuantizedTensor) -> Array:
    return np.asarray(qc.to_library(qw.dequantize(), "numpy")).astype(np.float64)


@pytest.fixture
def near(close: Callable[..., None]) -> Callable[..., None]:
    return lambda result, expected: close(np.asarray(result), expected)


# --- the functions, by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_quantize(bits: int, group_size: int, both: Any) -> None:
    qw = qc.quantize(both.array(W), bits=bits, group_size=group_size)
    theirs = mx.quantize(mx.array(W), group_size=group_size, bits=bits)
    for ours, native in zip(qw.flatten()[0], theirs, strict=True):
        np.testing.assert_array_equal(both.numpy(ours), np.asarray(native))
    assert qw.shape == W.shape


@pytest.mark.parametrize(("bits", "group_size"), SCHEMES)
def test_dequantize(bits: int, group_size: int, both: Any) -> None:
    qw = qc.quantize(both.array(W), bits=bits, group_size=group_size)
    packed, scales, biases = (mx.array(both.numpy(leaf)) for leaf in qw.flatten()[0])
    theirs = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
    np.testing.assert_array_equal(both.numpy(qc.dequantize(qw)), np.asarray(theirs))


def test_is_quantized(both: Any) -> None:
    """EMLX's ``quantized?``."""
    dense = both.array(W)
    assert qc.is_quantized(qc.quantize(dense)) is True
    assert qc.is_quantized(dense) is False
    assert qc.is_quantized(qc.quantize(dense).dequantize()) is False


@pytest.mark.parametrize("orientation", ["transpose", "no transpose"])
@pytest.mark.parametrize(("bits", "group_size"), EXTENDED)
def test_quantized_matmul(bits: int, group_size: int, orientation: str, both: Any, near: Any) -> None:
    """``quantized_matmul(x, w, transpose: true)`` is dot, ``transpose: false`` is matmul."""
    qw = qc.quantize(both.array(W), bits=bits, group_size=group_size)
    if orientation == "transpose":
        near(both.numpy(qc.dot(both.array(X), qw)), X @ exact(qw).T)
    else:
        y = RNG.standard_normal((2, 5, 96)).astype(np.float32)
        near(both.numpy(qc.matmul(both.array(y), qw)), y @ exact(qw))


def test_quantized_tensor(both: Any, near: Any) -> None:
    """Packed arrays from elsewhere, annotated; EMLX checks nothing, this checks everything."""
    packed, scales, biases = (both.array(np.asarray(part)) for part in mx.quantize(mx.array(W), group_size=32, bits=8))
    qw = qc.quantized_tensor(packed, scales, biases, W.shape, "affine-int8-g32")
    assert qw.packed is packed
    np.testing.assert_array_equal(exact(qw), exact(qc.quantize(both.array(W), bits=8, group_size=32)))
    near(both.numpy(qc.dot(both.array(X), qw)), X @ exact(qw).T)
    with pytest.raises(ValueError, match=r"packed.*\(96, 16\).*affine-int4-g32"):
        qc.quantized_tensor(packed, scales, biases, W.shape, "affine-int4-g32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_from_dense(dtype: str, both: Any) -> None:
    """EMLX's ``from_dense(tensor, opts)`` makes the annotated tensor that its ``Nx.dot`` takes."""
    import ml_dtypes

    dense = W.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    qw = qc.quantize(both.array(dense), "affine-int8-g64")
    assert isinstance(qw, QuantizedTensor)
    assert (qw.shape, qw.dtype_name, qw.scheme.bits, qw.scheme.group_size) == (W.shape, dtype, 8, 64)
    assert str(qw.scales.dtype).endswith(dtype)
    assert qw.nbytes < dense.nbytes
    assert np.abs(exact(qw) - dense.astype(np.float64)).max() < 0.05


def test_transparent_dot_with_nx_axes(both: Any, near: Any) -> None:
    """``Nx.dot(input, [2], qw, [1])``, at a call site that knows nothing of quantization."""

    def layer(x: Any, w: Any) -> Any:
        return qc.dot(x, w, axes=([2], [1]))

    dense = both.array(W)
    qw = qc.quantize(dense, bits=8, group_size=32)
    near(both.numpy(layer(both.array(X), qw)), X @ exact(qw).T)
    near(both.numpy(layer(both.array(X), dense)), X @ W.T.astype(np.float64))


def test_transparent_dot_with_the_operator(near: Any) -> None:
    qw = qc.quantize(W)
    near(X @ qw.mT, X @ exact(qw).T)
    np.testing.assert_array_equal(X @ qw.mT, qc.dot(X, qw))


def test_transparent_dot_in_a_namespace(both: Any, near: Any) -> None:
    qw = qc.quantize(both.array(W))
    x = both.array(X)
    near(both.numpy(qc.array_namespace(x, qw).matmul(x, qw.mT)), X @ exact(qw).T)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(("bits", "group_size"), EXTENDED)
def test_both_weight_layouts(layout: str, bits: int, group_size: int, both: Any, near: Any) -> None:
    """Weights stored (out, in), as checkpoints have them, and (in, out), as Axon has them."""
    if layout == "out_in":
        qw = qc.quantize(both.array(W), bits=bits, group_size=group_size)
        result = qc.dot(both.array(X), qw, axes=([2], [1]))
    else:
        qw = qc.quantize(both.array(W.T.copy()), bits=bits, group_size=group_size, axis=-2)
        assert qw.shape == (64, 96)
        result = qc.dot(both.array(X), qw, axes=([2], [0]))
    dense = exact(qw) if layout == "out_in" else exact(qw).T
    near(both.numpy(result), X @ dense.T)
    assert np.abs(dense - W).mean() < {1: 1.5, 2: 0.5}.get(bits, 0.25)


# --- inside a compiled function -------------------------------------------------------------------------------

TRACED = [
    pytest.param(4, 32, False, id="native kernel, grouped"),
    pytest.param(4, 32, True, id="native kernel, ungrouped"),
    pytest.param(3, 64, False, id="3 bits, grouped"),
    pytest.param(4, 16, False, id="array-API way, grouped"),
    pytest.param(4, 16, True, id="array-API way, ungrouped"),
]


def stored(bits: int, group_size: int, flip: bool) -> QuantizedTensor:
    """A weight of shape (96, 64), with the groups along axis −1 or −2."""
    w = mx.array(W)
    return qc.quantize(w, bits=bits, group_size=group_size, axis=-2 if flip else -1)


@pytest.mark.parametrize(("bits", "group_size", "flip"), TRACED)
def test_compiled_function_that_closes_over_the_weight(bits: int, group_size: int, flip: bool, near: Any) -> None:
    qw = stored(bits, group_size, flip)
    traces = []

    def layer(x: Any) -> Any:
        traces.append(x.shape)
        return mx.maximum(qc.dot(x, qw), 0)

    compiled = mx.compile(layer)
    expected = np.maximum(X @ exact(qw).T, 0)
    for _ in range(2):
        near(compiled(mx.array(X)), expected)
    assert len(traces) == 1  # dispatch happened at trace time
    near(layer(mx.array(X)), expected)


@pytest.mark.parametrize(("bits", "group_size", "flip"), TRACED)
def test_compiled_function_that_takes_the_leaves(bits: int, group_size: int, flip: bool, near: Any) -> None:
    qw = stored(bits, group_size, flip)
    leaves, rebuild = qw.flatten()
    compiled = mx.compile(lambda x, leaves: qc.dot(x, rebuild(leaves)))
    near(compiled(mx.array(X), list(leaves)), X @ exact(qw).T)
    other = qc.quantize(mx.array(W[::-1].copy()), bits=bits, group_size=group_size, axis=-2 if flip else -1)
    near(compiled(mx.array(X), list(other.flatten()[0])), X @ exact(other).T)


@pytest.mark.parametrize(("bits", "group_size", "flip"), TRACED)
def test_quantizing_inside_the_trace_that_uses_it(bits: int, group_size: int, flip: bool, near: Any) -> None:
    """In EMLX a freshly quantized value can't feed a traced dot; here it can."""

    def step(x: Any, w: Any) -> Any:
        fresh = qc.quantize(w, bits=bits, group_size=group_size, axis=-2 if flip else -1)
        assert fresh.shape == (96, 64)
        return qc.dot(x, fresh)

    near(mx.compile(step)(mx.array(X), mx.array(W)), X @ exact(stored(bits, group_size, flip)).T)


def test_take_and_gather_dot_inside_a_trace(near: Any) -> None:
    table = qc.quantize(mx.array(W), group_size=32)
    experts = qc.quantize(mx.array(W.reshape(3, 32, 64)), group_size=32)

    def step(tokens: Any, chosen: Any) -> Any:
        rows = qc.take(table, tokens)
        return qc.gather_dot(rows[:, None, :], experts, rhs_indices=chosen)

    tokens, chosen = np.asarray([5, 0, 95]), np.asarray([2, 0, 1])
    expected = np.matmul(exact(table)[tokens][:, None, :], np.swapaxes(exact(experts)[chosen], -1, -2))
    near(mx.compile(step)(mx.array(tokens), mx.array(chosen)), expected)


def test_dequantize_inside_a_trace() -> None:
    leaves, rebuild = qc.quantize(mx.array(W), bits=8, group_size=32).mT.flatten()
    dense = mx.compile(lambda leaves: rebuild(leaves).dequantize())(list(leaves))
    np.testing.assert_allclose(np.asarray(dense), exact(rebuild(leaves)), atol=1e-6)


# --- gradients for x ------------------------------------------------------------------------------------------


def numeric(loss: Callable[[Array], float], x: Array) -> Array:
    """Central differences in float64."""
    gradient = np.zeros_like(x)
    for position in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[position] = 1e-5
        gradient[position] = (loss(x + step) - loss(x - step)) / 2e-5
    return gradient


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("bits", "group_size", "flip"), TRACED)
def test_gradient_of_x(bits: int, group_size: int, flip: bool, compiled: bool, near: Any) -> None:
    qw = stored(bits, group_size, flip)
    x = X[0, :2]

    def loss(x: Any) -> Any:
        return mx.sum(mx.sin(qc.dot(x, qw)))

    gradient = mx.grad(loss)
    found = (mx.compile(gradient) if compiled else gradient)(mx.array(x))
    w = exact(qw)
    near(found, np.cos(x @ w.T) @ w)
    near(found, numeric(lambda x: float(np.sin(x @ w.T).sum()), x.astype(np.float64)))


@pytest.mark.parametrize(("bits", "group_size", "flip"), TRACED)
def test_vjp_of_x(bits: int, group_size: int, flip: bool, near: Any) -> None:
    qw = stored(bits, group_size, flip)
    cotangent = RNG.standard_normal((2, 5, 96)).astype(np.float32)
    (value,), (pulled,) = mx.vjp(lambda x: qc.dot(x, qw), [mx.array(X)], [mx.array(cotangent)])
    near(value, X @ exact(qw).T)
    near(pulled, cotangent @ exact(qw))


@pytest.mark.parametrize("group_size", [16, 32])
def test_vjp_through_a_stack_and_through_gather_dot(group_size: int, near: Any) -> None:
    experts = qc.quantize(mx.array(W.reshape(3, 32, 64)), group_size=group_size)
    x = RNG.standard_normal((3, 4, 64)).astype(np.float32)
    cotangent = RNG.standard_normal((3, 4, 32)).astype(np.float32)
    _, (pulled,) = mx.vjp(lambda x: qc.dot(x, experts), [mx.array(x)], [mx.array(cotangent)])
    near(pulled, cotangent @ exact(experts))
    chosen = [2, 0, 2]
    _, (pulled,) = mx.vjp(
        lambda x: qc.gather_dot(x, experts, rhs_indices=mx.array(chosen)), [mx.array(x)], [mx.array(cotangent)]
    )
    near(pulled, cotangent @ exact(experts)[chosen])


def test_gradient_through_a_left_operand_and_axes(near: Any) -> None:
    qw = stored(4, 32, False)
    x = X[0]
    w = exact(qw)
    left = mx.grad(lambda x: mx.sum(mx.sin(qc.dot(qw, x))))(mx.array(x))
    near(left, np.cos(x @ w.T) @ w)
    named = mx.grad(lambda x: mx.sum(mx.sin(qc.dot(x, qw, axes=([2], [1])))))(mx.array(X))
    near(named, np.cos(X @ w.T) @ w)


# --- EMLX's limits, lifted ------------------------------------------------------------------------------------


def test_weights_of_more_than_two_axes(both: Any, near: Any) -> None:
    stack = qc.quantize(both.array(W.reshape(3, 32, 64)), group_size=32)
    near(both.numpy(qc.dot(both.array(X[0]), stack)), X[0] @ np.swapaxes(exact(stack), -1, -2))


def test_a_quantized_left_operand(both: Any, near: Any) -> None:
    qw = qc.quantize(both.array(W), group_size=32)
    near(both.numpy(qc.dot(qw, both.array(X[0]))), exact(qw) @ X[0].T)


def test_in_features_that_are_not_whole_groups(both: Any, near: Any) -> None:
    qw = qc.quantize(both.array(W[:, :50].copy()), group_size=32, pad=True)
    assert qw.shape == (96, 50)
    near(both.numpy(qc.dot(both.array(X[..., :50].copy()), qw)), X[..., :50] @ exact(qw).T)


def test_axes_of_the_left_operand_are_honoured(both: Any, near: Any) -> None:
    qw = qc.quantize(both.array(W), group_size=32)
    x = RNG.standard_normal((64, 3)).astype(np.float32)
    near(both.numpy(qc.dot(both.array(x), qw, axes=([0], [1]))), x.T @ exact(qw).T)
