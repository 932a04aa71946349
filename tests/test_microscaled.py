"""The microscaled modes beyond the conformance kit: MLX's own numbers, bad input, libraries without such kernels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import quantcore as qc
from quantcore import QuantizedTensor, Scheme
from quantcore.cli import app

MODES = ("mxfp4", "mxfp8", "nvfp4")
RNG = np.random.default_rng(0)


def weight(shape: tuple[int, ...] = (12, 64)) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize("mode", MODES)
def test_decodes_as_mlx_does(mode: str) -> None:
    packed, scales = mx.quantize(mx.array(weight()), mode=mode)
    qw = qc.quantized_tensor(np.asarray(packed), np.asarray(scales), None, (12, 64), mode)
    expected = mx.dequantize(packed, scales, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(qw.dequantize(), np.asarray(expected))
    assert qw.dtype == np.float32


@pytest.mark.parametrize("mode", MODES)
def test_encodes_as_mlx_does_but_for_halves_and_the_sign_of_zero(mode: str) -> None:
    w = weight((64, 256))
    qw = qc.quantize(w, mode)
    packed, scales = mx.quantize(mx.array(w), mode=mode)
    np.testing.assert_array_equal(qw.scales, np.asarray(scales))
    theirs = mx.dequantize(packed, scales, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(qw.dequantize(), np.asarray(theirs))


@pytest.mark.parametrize("mode", MODES)
def test_mlx_leaves_encoding_to_the_exact_encoder_and_computes_the_rest(mode: str) -> None:
    w = mx.array(weight())
    told = qc.explain("quantize", w, scheme=mode)
    assert told.backend == "array_api"
    assert "halves towards zero" in str(told)
    with pytest.warns(qc.PerformanceWarning, match="halves towards zero"):
        qw = qc.quantize(w, mode)
    np.testing.assert_array_equal(qw.to("numpy").packed, qc.quantize(np.asarray(w), mode).packed)
    assert qc.explain("dot", mx.ones((2, 64)), qw).backend == "mlx"


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_without_biases_is_whole(mode: str) -> None:
    qw = qc.quantize(weight((3, 12, 64)), mode)
    assert qw.biases is None
    assert qw.scales.dtype == np.uint8
    assert qw.bits_per_weight == Scheme(mode).bits + 8 / (Scheme(mode).group_size or 0)
    leaves, rebuild = qw.flatten()
    assert len(leaves) == 2
    expected = qw.dequantize()
    for other in (rebuild(leaves), pickle.loads(pickle.dumps(qw)), copy.deepcopy(qw), qw.to("mlx").to("numpy")):
        assert other.scheme is qw.scheme
        assert other.biases is None
        np.testing.assert_array_equal(other.dequantize(), expected)
    np.testing.assert_array_equal(qw[1, 2:5].dequantize(), expected[1, 2:5])
    np.testing.assert_array_equal(qw.mT.dequantize(), np.swapaxes(expected, -1, -2))
    assert mode in repr(qw)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
def test_libraries_without_kernels_of_their_own(mode: str) -> None:
    import jax
    import torch

    w = weight()
    local = qc.quantize(w, mode)
    x = weight((3, 64))
    expected = x @ local.dequantize().T

    own = qc.quantize(torch.from_numpy(w), mode)
    np.testing.assert_array_equal(own.to("numpy").packed, local.packed)
    operand = torch.from_numpy(x).requires_grad_()
    product = qc.dot(operand, own)
    product.sum().backward()  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(product.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert operand.grad is not None
    np.testing.assert_allclose(operand.grad[0].numpy(), local.dequantize().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.nn.functional.linear(operand, own), product)

    traced = local.to("jax")
    assert len(jax.tree.leaves(traced)) == 2
    np.testing.assert_allclose(jax.jit(qc.dot)(x_of(jax, x), traced), expected, rtol=1e-5, atol=1e-4)
    again = jax.jit(lambda w: qc.quantize(w, mode))(x_of(jax, w))
    assert isinstance(again, QuantizedTensor)
    np.testing.assert_array_equal(again.to("numpy").packed, local.packed)


def x_of(jax: Any, values: np.ndarray[Any, Any]) -> Any:
    return jax.numpy.asarray(values)


@pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
def test_layers_of_torch() -> None:
    import torch

    import quantcore.torch as qt

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    x = torch.from_numpy(weight((5, 64)))
    qt.quantize_module(model, "mxfp4")
    expected = model(x)
    state = model.state_dict()
    assert {name.rpartition(".")[2] for name in state} == {"bias", "packed", "scales"}
    other = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    qt.quantize_module(other, "mxfp4")
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    half = copy.deepcopy(other).half()
    assert half[0].quantized.scales.dtype == torch.uint8
    assert half(x.half()).dtype == torch.float16
    compiled = torch.compile(other, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_a_layer_without_values_yet_takes_a_state() -> None:
    import torch

    import quantcore.torch as qt

    layer = qt.QuantizedLinear(64, 8, scheme="mxfp4")
    assert (layer.weight.scheme, layer.weight.dtype, layer.weight.biases) == (Scheme("mxfp4"), torch.float32, None)
    dense = torch.nn.Linear(64, 8)
    model = torch.nn.Sequential(dense)
    qt.quantize_module(model, "mxfp4")
    layer.load_state_dict(model[0].state_dict())
    assert torch.equal(layer.weight.dequantize(), model[0].weight.dequantize())


def test_jax_has_no_compiled_kernels_to_load() -> None:
    import quantcore.jax as qj

    with pytest.raises(ValueError, match="mxfp4 has no compiled kernels in JAX"):
        qj.load("mxfp4")


@pytest.mark.parametrize("op", ["quantize", "dequantize", "dot", "take"])
@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_explained_on_the_command_line(op: str, library: str) -> None:
    told = CliRunner().invoke(app, ["explain", op, "--library", library, "--scheme", "nvfp4"])
    assert told.exit_code == 0, told.output
    assert "computes it" in told.output


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"biases": np.zeros((12, 2), np.float32)}, TypeError, "mxfp4 has no biases; pass None"),
        ({"scales": np.ones((12, 2), np.float32)}, TypeError, "scales must be uint8 in mxfp4, not float32"),
        ({"scales": np.ones((12, 3), np.uint8)}, ValueError, r"scales has shape \(12, 3\).*\(12, 2\)"),
        ({"packed": np.zeros((12, 8), np.int32)}, TypeError, "packed must be uint32"),
        ({"dtype": "float64"}, TypeError, "dtype must be one of"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], error: type[Exception], why: str) -> None:
    parts = {"packed": np.zeros((12, 8), np.uint32), "scales": np.ones((12, 2), np.uint8), "biases": None} | change
    with pytest.raises(error, match=why):
        qc.quantized_tensor(
            parts["packed"], parts["scales"], parts["biases"], (12, 64), "mxfp4", dtype=parts.get("dtype")
        )


def test_affine_needs_its_biases() -> None:
    with pytest.raises(TypeError, match="affine-int4-g32 needs biases, not None"):
        qc.quantized_tensor(
            np.zeros((12, 8), np.uint32), np.ones((12, 2), np.float32), None, (12, 64), "affine-int4-g32"
        )


@pytest.mark.parametrize("axis", [-1, -2])
def test_nvfp4_says_what_it_cannot_reach(axis: int) -> None:
    w = weight((32, 32))
    w[3, 5] = -2784
    assert qc.quantize(w, "nvfp4", axis=axis).dequantize()[3, 5] == -2688
    w[3, 5] = -2785
    with pytest.raises(ValueError, match=r"-2785.0 at \(3, 5\); nvfp4 reaches 2784.*mxfp4"):
        qc.quantize(w, "nvfp4", axis=axis)
    assert np.isfinite(qc.quantize(w * 1e30, "mxfp4", axis=axis).dequantize()).all()


def test_rows_that_are_not_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"40 elements.*groups of 32 \(mxfp4\); pass pad=True"):
        qc.quantize(weight((4, 40)), "mxfp4")
    qw = qc.quantize(weight((4, 40)), "mxfp4", pad=True)
    assert qw.shape == (4, 40)
    assert qw.scales.shape == (4, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_weights(value: float) -> None:
    w = weight((4, 64))
    w[2, 40] = value
    with pytest.raises(ValueError, match=r"\(2, 40\) \(mxfp8\); pass nonfinite='clip'"):
        qc.quantize(w, "mxfp8")
    clipped = qc.quantize(w, "mxfp8", nonfinite="clip").dequantize()
    largest = np.abs(np.delete(w[2, 32:], 8)).max()
    assert clipped[2, 40] == pytest.approx(0 if np.isnan(value) else largest, rel=0.07)


def test_options_that_contradict_the_mode() -> None:
    with pytest.raises(ValueError, match="mxfp4 has 4 bits in groups of 32, not 8 bits"):
        qc.quantize(weight(), mode="mxfp4", bits=8)
    assert qc.quantize(weight(), mode="nvfp4", group_size=16).scheme is Scheme("nvfp4")
