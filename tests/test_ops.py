"""The call surface against dense NumPy in float64: shapes, axes, dtypes, options, indices, and nothing at all."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantcore as qc
from quantcore import QuantizedTensor

Array = np.ndarray[Any, Any]

WIDTH = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
quiet = pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
pytestmark = quiet


def numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape).astype(numpy_dtype(dtype))
    return np.asarray(values)


def weight(*shape: int, bits: int = 4, group_size: Any = 16, pad: bool = True, seed: int = 1, **options: Any) -> Any:
    return qc.quantize(random(*shape, seed=seed), bits=bits, group_size=group_size, pad=pad, **options)


def exact(array: Any) -> Array:
    """The operand in float64; the float32 value of a quantized one, whatever its dtype."""
    return np.asarray(qc.dequantize(array, dtype="float32") if qc.is_quantized(array) else array).astype(np.float64)


def transposed(array: Array) -> Array:
    return np.swapaxes(array, -1, -2) if array.ndim > 1 else array


def nmse(result: Array, expected: Array, x: Array, w: Array) -> float:
    """Error of the worst row of x; w has the contracted axis last."""
    error = ((result - expected) ** 2).sum(-1)
    floor = (x**2).sum(-1) * (w**2).sum() / w.shape[-1]
    scale = np.maximum((expected**2).sum(-1), np.broadcast_to(floor, error.shape))
    return float((error / np.where(scale == 0, 1, scale)).max(initial=0))


def agree(result: Array, expected: Array, *, bound: float = 1e-8) -> None:
    """The same shape, and values as near as the default precision promises."""
    assert result.shape == expected.shape
    result = result.astype(np.float64)
    assert np.isfinite(result).all()
    spread = float((expected**2).sum()) or 1.0
    assert float(((result - expected) ** 2).sum()) <= bound * spread


# --- quantize and dequantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, "row"])
def test_dequantize_is_code_times_scale_plus_bias(
    lib: Any, bits: int, group_size: Any, decode: Callable[[QuantizedTensor], Array]
) -> None:
    qw = weight(3, 300, bits=bits, group_size=group_size)
    dense = lib.numpy(qw.to(lib.name).dequantize())
    assert dense.dtype == np.float32
    np.testing.assert_allclose(dense, decode(qw), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(dense, qw.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_quantization_error_is_at_most_about_half_a_step(lib: Any, bits: int) -> None:
    w = random(8, 96)
    qw = qc.quantize(lib.array(w), bits=bits, group_size=32)
    error = np.abs(lib.numpy(qw.dequantize()) - w).reshape(8, 3, 32)
    steps = np.abs(lib.numpy(qw.scales))
    # the bias moves by up to half a step so that zero is a code, and one end is then up to a step away
    assert (error <= 1.001 * steps[..., None]).all()
    assert error.mean() < 0.4 * steps.mean()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 128, "row"])
def test_libraries_quantize_to_the_same_bits(bits: int, dtype: str, group_size: Any, libraries: dict[str, Any]) -> None:
    w = random(5, 256, dtype=dtype)
    w[1], w[2], w[3, :32] = -abs(w[1]), 0, 0.125
    ours = qc.quantize(w, bits=bits, group_size=group_size)
    assert ours.scales.dtype == ours.biases.dtype == w.dtype
    for name in ("mlx", "array_api_strict"):
        lib = libraries[name]
        if dtype not in lib.dtypes:
            continue
        theirs = qc.quantize(lib.array(w), bits=bits, group_size=group_size)
        for mine, other in zip(ours.flatten()[0], theirs.flatten()[0], strict=True):
            assert mine.tobytes() == lib.numpy(other).tobytes(), name


def test_axis_minus_two_is_the_transpose_of_the_transposed(lib: Any) -> None:
    w = random(3, 64, 5)
    along = qc.quantize(lib.array(w), group_size=32, axis=-2)
    assert along.shape == (3, 64, 5)
    assert along.transposed
    other = qc.quantize(lib.array(np.ascontiguousarray(transposed(w))), group_size=32)
    np.testing.assert_array_equal(lib.numpy(along.packed), lib.numpy(other.packed))
    np.testing.assert_array_equal(lib.numpy(along.dequantize()), transposed(lib.numpy(other.dequantize())))
    x = random(4, 64, seed=5)
    agree(lib.numpy(qc.matmul(lib.array(x), along)), x.astype(np.float64) @ lib.numpy(along.dequantize()))
    y = random(4, 5, seed=6)
    agree(lib.numpy(qc.dot(lib.array(y), along)), y @ transposed(lib.numpy(along.dequantize())).astype(np.float64))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("in_features", [1, 5, 31, 33, 100])
def test_pad_repeats_the_last_element_and_keeps_the_size(lib: Any, bits: int, in_features: int) -> None:
    w = random(4, in_features)
    qw = qc.quantize(lib.array(w), bits=bits, group_size=32, pad=True)
    assert qw.shape == (4, in_features)
    filled = np.concatenate([w, np.repeat(w[:, -1:], -in_features % 32, axis=1)], axis=1)
    full = qc.quantize(lib.array(filled), bits=bits, group_size=32)
    np.testing.assert_array_equal(lib.numpy(qw.scales), lib.numpy(full.scales))
    np.testing.assert_array_equal(lib.numpy(qw.dequantize()), lib.numpy(full.dequantize())[:, :in_features])
    spare = qw.packed.shape[-1] * 32 - in_features * bits
    assert 0 <= spare < 32
    assert (lib.numpy(qw.packed)[:, -1].astype(np.uint64) >> (32 - spare) == 0).all()


def test_pad_changes_nothing_where_groups_are_whole() -> None:
    w = random(4, 64)
    a, b = qc.quantize(w, group_size=32), qc.quantize(w, group_size=32, pad=True)
    assert a.packed.tobytes() == b.packed.tobytes()


def test_float64_is_encoded_from_its_float32_value(lib: Any) -> None:
    w = random(4, 64).astype(np.float64) * (1 + 1e-12)
    qw = qc.quantize(lib.array(w), group_size=32)
    assert qw.dtype_name == "float32"
    assert qw.packed.shape == (4, 8)
    np.testing.assert_array_equal(lib.numpy(qw.packed), qc.quantize(w.astype(np.float32), group_size=32).packed)
    assert lib.numpy(qw.scales).dtype == np.float32


def test_strided_read_only_and_byte_swapped_weights() -> None:
    w = random(8, 64)
    expected = qc.quantize(w, group_size=32)
    frozen = w.copy()
    frozen.flags.writeable = False
    wide = np.repeat(np.repeat(w, 2, 0), 2, 1)[::2, ::2]
    for odd in (np.asfortranarray(w), w.astype(">f4"), frozen, wide):
        found = qc.quantize(odd, group_size=32)
        assert found.packed.tobytes() == expected.packed.tobytes()
        assert found.scales.dtype.isnative
        np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


NONFINITE = [
    (0, 3, float("nan")),
    (1, 40, float("inf")),
    (2, 63, float("-inf")),
]


@pytest.mark.parametrize(("row", "column", "value"), NONFINITE)
@pytest.mark.parametrize("axis", [-1, -2])
def test_nonfinite_is_an_error_that_names_the_position(
    lib: Any, row: int, column: int, value: float, axis: int
) -> None:
    w = random(4, 64)
    w[row, column] = value
    position = (row, column)
    if axis == -2:
        w, position = np.ascontiguousarray(w.T), (column, row)
    with pytest.raises(ValueError, match=rf"{value}.*{position[0]}, {position[1]}.*affine-int4-g32.*clip"):
        qc.quantize(lib.array(w), group_size=32, axis=axis)


def test_clip_replaces_by_the_group_s_largest_finite_magnitude(lib: Any) -> None:
    w = random(3, 64)
    w[0, 0], w[0, 1], w[1, 40], w[2, :32] = np.nan, np.inf, -np.inf, np.nan
    wanted = w.copy()
    wanted[0, 0], wanted[2, :32] = 0, 0
    wanted[0, 1] = np.abs(w[0, 2:32]).max()
    wanted[1, 40] = -np.abs(np.delete(w[1, 32:], 8)).max()
    found = qc.quantize(lib.array(w), group_size=32, nonfinite="clip")
    expected = qc.quantize(lib.array(wanted), group_size=32)
    for ours, theirs in zip(found.flatten()[0], expected.flatten()[0], strict=True):
        np.testing.assert_array_equal(lib.numpy(ours), lib.numpy(theirs))


def test_clip_of_a_short_last_group_and_of_nothing_finite(lib: Any) -> None:
    w = np.full((2, 40), np.inf, np.float32)
    w[0, 35] = -2.0
    found = qc.quantize(lib.array(w), group_size=32, pad=True, nonfinite="clip")
    dense = lib.numpy(found.dequantize())
    np.testing.assert_allclose(dense[0, :32], 0, atol=1e-6)
    np.testing.assert_allclose(dense[0, 32:], [2, 2, 2, -2, 2, 2, 2, 2], rtol=0.2)
    np.testing.assert_allclose(dense[1], 0, atol=1e-6)


def test_a_scale_that_overflows_its_dtype_is_an_error() -> None:
    w = np.zeros((2, 64), np.float16)
    w[1, 32], w[1, 33] = 65504, -65504
    with pytest.raises(ValueError, match=r"scale of row \(1,\), group 1 .*float16.*affine-int1-g32.*float32"):
        qc.quantize(w, bits=1, group_size=32)


def test_dequantize_dtype(lib: Any) -> None:
    qw = weight(4, 64)
    for dtype in lib.dtypes:
        dense = lib.numpy(qc.dequantize(qw.to(lib.name), dtype=dtype))
        assert dense.dtype == np.dtype(numpy_dtype(dtype))
        np.testing.assert_array_equal(dense, qw.dequantize().astype(numpy_dtype(dtype)))


def test_half_precision_dequantize_rounds_once(decode: Callable[[QuantizedTensor], Array]) -> None:
    for dtype in ("float16", "bfloat16"):
        qw = qc.quantize(random(6, 128, dtype=dtype), bits=8, group_size=64)
        np.testing.assert_array_equal(qw.dequantize(), decode(qw).astype(np.float32).astype(numpy_dtype(dtype)))


def test_dequantize_of_a_dense_array_is_that_array() -> None:
    w = random(3, 4)
    assert qc.dequantize(w) is w
    assert qc.dequantize(w, dtype="float16").dtype == np.float16


def test_quantized_tensor_makes_no_copy(lib: Any) -> None:
    qw = weight(3, 64).to(lib.name)
    again = qc.quantized_tensor(qw.packed, qw.scales, qw.biases, (3, 64), "affine-int4-g16", dtype="float16")
    assert again.packed is qw.packed
    assert again.scales is qw.scales
    assert again.biases is qw.biases
    assert again.dtype_name == "float16"


def test_quantized_tensor_of_a_padded_weight() -> None:
    qw = weight(3, 50, group_size=32)
    again = qc.quantized_tensor(*qw.flatten()[0], qw.shape, qw.scheme)
    assert again.shape == (3, 50)
    np.testing.assert_array_equal(again.dequantize(), qw.dequantize())


# --- dot and matmul -------------------------------------------------------------------------------------------

SHAPES = [
    ((64,), (5, 64)),
    ((1, 64), (5, 64)),
    ((3, 64), (5, 64)),
    ((2, 3, 64), (5, 64)),
    ((2, 1, 3, 64), (5, 64)),
    ((64,), (3, 5, 64)),
    ((3, 64), (2, 5, 64)),
    ((2, 3, 64), (2, 5, 64)),
    ((1, 3, 64), (2, 5, 64)),
    ((2, 3, 64), (1, 5, 64)),
    ((4, 1, 3, 64), (2, 5, 64)),
    ((3, 64), (2, 4, 5, 64)),
    ((4, 3, 64), (2, 4, 5, 64)),
    ((2, 1, 3, 64), (4, 5, 64)),
    ((64,), (1, 64)),
    ((7, 64), (1, 1, 64)),
]


@pytest.mark.parametrize("flip", [False, True], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize(("x_shape", "w_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [16, 32])
def test_dot_is_matmul_with_the_transposed_weight(
    lib: Any, x_shape: tuple[int, ...], w_shape: tuple[int, ...], flip: bool, group_size: int, close: Any
) -> None:
    x = random(*x_shape)
    qw = weight(*w_shape, group_size=group_size)
    if flip:  # contract the ungrouped axis
        qw = weight(*w_shape[:-2], w_shape[-1], w_shape[-2], group_size=group_size).mT
    expected = np.matmul(exact(x), transposed(exact(qw)))
    moved, operand = qw.to(lib.name), lib.array(x)
    close(lib.numpy(qc.dot(operand, moved)), expected, x, exact(qw))
    close(lib.numpy(qc.matmul(operand, moved.mT)), expected, x, exact(qw))
    dense = moved.dequantize()
    close(lib.numpy(qc.dot(operand, dense)), expected, x, exact(qw))


@pytest.mark.parametrize(("x_shape", "w_shape"), SHAPES, ids=str)
def test_quantized_left_operand(lib: Any, x_shape: tuple[int, ...], w_shape: tuple[int, ...], close: Any) -> None:
    x = random(*x_shape)
    qw = weight(*w_shape)
    moved, operand = qw.to(lib.name), lib.array(x)
    close(lib.numpy(qc.dot(moved, operand)), np.matmul(exact(qw), transposed(exact(x))), x, exact(qw))
    right = lib.array(np.ascontiguousarray(transposed(x)))
    close(lib.numpy(qc.matmul(moved, right)), np.matmul(exact(qw), transposed(exact(x))), x, exact(qw))
    other = weight(*w_shape[:-2], w_shape[-1], w_shape[-2]).mT
    expected = np.matmul(exact(other), transposed(exact(x)))
    close(lib.numpy(qc.matmul(other.to(lib.name), right)), expected, x, exact(other))


@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((5, 64), (7, 64)), ((7, 64), (5, 64)), ((2, 5, 64), (7, 64)), ((5, 64), (2, 7, 64))]
)
def test_both_quantized(lib: Any, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    a, b = weight(*a_shape), weight(*b_shape, seed=9, bits=8)
    expected = np.matmul(exact(a), transposed(exact(b)))
    one, other = a.to(lib.name), b.to(lib.name)
    agree(lib.numpy(qc.dot(one, other)), expected)
    agree(lib.numpy(qc.matmul(one, other.mT)), expected)
    if a.ndim == b.ndim == 2:
        agree(lib.numpy(qc.tensordot(one, other, axes=([1], [1]))), expected)


sizes = st.integers(0, 4)


@st.composite
def operands(draw: st.DrawFn) -> tuple[Array, QuantizedTensor]:
    """Shapes of x and of a weight whose leading axes broadcast, with sizes from 0."""
    batch = draw(st.lists(sizes, max_size=2))
    x_batch = [1 if draw(st.booleans()) else n for n in batch][draw(st.integers(0, len(batch))) :]
    w_batch = [1 if draw(st.booleans()) else n for n in batch][draw(st.integers(0, len(batch))) :]
    contracted = draw(st.integers(1, 70))
    x_shape = (*x_batch, draw(sizes), contracted)
    if draw(st.booleans()) and not x_batch:
        x_shape = (contracted,)
    bits, group_size = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8])), draw(st.sampled_from([16, 32, 64, "row"]))
    rows = draw(sizes)
    if draw(st.booleans()):
        return random(*x_shape), weight(*w_batch, rows, contracted, bits=bits, group_size=group_size)
    rows = max(rows, 1)  # now the grouped axis
    return random(*x_shape), weight(*w_batch, contracted, rows, bits=bits, group_size=group_size).mT


@settings(max_examples=150)
@given(operands())
def test_any_shapes_in_every_library(libraries: dict[str, Any], pair: tuple[Array, QuantizedTensor]) -> None:
    x, qw = pair
    expected = np.matmul(exact(x), transposed(exact(qw)))
    for lib in libraries.values():
        agree(lib.numpy(qc.dot(lib.array(x), qw.to(lib.name))), expected)
        agree(lib.numpy(qc.matmul(lib.array(x), qw.mT.to(lib.name))), expected)


# --- tensordot ------------------------------------------------------------------------------------------------


def legal_axes(x_ndim: int, w_ndim: int) -> list[tuple[list[int], list[int]]]:
    """Every pairing of axes that takes exactly one of the last two of w, in every order."""
    found = []
    for count in range(1, min(x_ndim, w_ndim) + 1):
        for w_axes in itertools.permutations(range(w_ndim), count):
            if sum(axis >= w_ndim - 2 for axis in w_axes) != 1:
                continue
            found += [(list(x_axes), list(w_axes)) for x_axes in itertools.combinations(range(x_ndim), count)]
    return found


@pytest.mark.parametrize("flip", [False, True], ids=["grouped last", "grouped axis -2"])
@pytest.mark.parametrize(("x_ndim", "w_ndim"), [(1, 2), (2, 2), (3, 2), (2, 3), (3, 3), (3, 4)])
def test_every_legal_combination_of_axes(libraries: dict[str, Any], x_ndim: int, w_ndim: int, flip: bool) -> None:
    lengths = (2, 3, 5, 32)[-w_ndim:]
    qw = weight(*lengths)
    if flip:
        qw = qw.mT
    w = exact(qw)
    combinations = legal_axes(x_ndim, w_ndim)
    assert combinations
    every = {"numpy": 1, "mlx": 7, "array_api_strict": 7}
    for number, (x_axes, w_axes) in enumerate(combinations):
        shape = [4] * x_ndim
        for i, j in zip(x_axes, w_axes, strict=True):
            shape[i] = w.shape[j]
        x = random(*shape)
        expected = np.tensordot(exact(x), w, axes=(x_axes, w_axes))
        for name, step in every.items():
            if number % step:
                continue
            lib = libraries[name]
            operand, moved = lib.array(x), qw.to(name)
            agree(lib.numpy(qc.tensordot(operand, moved, axes=(x_axes, w_axes))), expected)
            agree(lib.numpy(qc.dot(operand, moved, axes=(x_axes, w_axes))), expected)
            negative = ([i - x_ndim for i in x_axes], [j - w_ndim for j in w_axes])
            agree(lib.numpy(qc.dot(operand, moved, axes=negative)), expected)
            left = np.tensordot(w, exact(x), axes=(w_axes, x_axes))
            agree(lib.numpy(qc.tensordot(moved, operand, axes=(w_axes, x_axes))), left)


@settings(max_examples=100)
@given(st.data())
def test_any_legal_axes_of_any_sizes(data: st.DataObject) -> None:
    w_ndim, x_ndim = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    qw = weight(*data.draw(st.lists(st.integers(0, 3), min_size=w_ndim - 1, max_size=w_ndim - 1)), 17)
    qw = qw.mT if data.draw(st.booleans()) else qw
    x_axes, w_axes = data.draw(st.sampled_from(legal_axes(x_ndim, w_ndim)))
    shape = data.draw(st.lists(st.integers(0, 3), min_size=x_ndim, max_size=x_ndim))
    for i, j in zip(x_axes, w_axes, strict=True):
        shape[i] = qw.shape[j]
    x = random(*shape)
    product = qc.dot(x, qw, axes=(x_axes, w_axes), precision="highest")  # by default, one sum of few terms may cancel
    agree(product, np.tensordot(exact(x), exact(qw), axes=(x_axes, w_axes)))


def test_an_int_means_the_last_of_x_with_the_first_of_w(lib: Any) -> None:
    x, qw = random(2, 64), weight(5, 64).mT
    agree(lib.numpy(qc.tensordot(lib.array(x), qw.to(lib.name), axes=1)), exact(x) @ exact(qw))
    stack, y = weight(3, 5, 64), random(2, 3, 5)
    agree(lib.numpy(qc.dot(lib.array(y), stack.to(lib.name), axes=2)), np.tensordot(exact(y), exact(stack), axes=2))
    agree(lib.numpy(qc.tensordot(lib.array(y), stack.to(lib.name))), np.tensordot(exact(y), exact(stack), axes=2))


def test_axes_may_be_bare_ints_and_tuples() -> None:
    x, qw = random(2, 3, 64), weight(5, 64)
    expected = np.tensordot(exact(x), exact(qw), axes=([2], [1]))
    for axes in [(2, 1), ((2,), (1,)), [[2], [1]], (np.int64(2), [np.int32(1)]), (-1, -1)]:
        agree(qc.tensordot(x, qw, axes=axes), expected)


def test_axes_do_not_batch(lib: Any) -> None:
    x, qw = random(2, 3, 64), weight(2, 5, 64)
    result = lib.numpy(qc.dot(lib.array(x), qw.to(lib.name), axes=([2], [2])))
    assert result.shape == (2, 3, 2, 5)
    agree(result, np.tensordot(exact(x), exact(qw), axes=([2], [2])))


def test_dense_tensordot_takes_any_axes(lib: Any) -> None:
    x, w = random(2, 3, 4), random(3, 4, 5)
    for axes in (0, 2, ([1, 2], [0, 1]), ([], [])):
        agree(
            lib.numpy(qc.tensordot(lib.array(x), lib.array(w), axes=axes)), np.tensordot(exact(x), exact(w), axes=axes)
        )


# --- dtypes ---------------------------------------------------------------------------------------------------


def promoted(a: str, b: str) -> str:
    if a == b:
        return a
    if {a, b} == {"float16", "bfloat16"}:
        return "float32"
    return max(a, b, key=WIDTH.__getitem__)


HALVES = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5, "float64": 1e-5}


X_DTYPES, W_DTYPES = ("float16", "bfloat16", "float32", "float64"), ("float16", "bfloat16", "float32")
PAIRS = [
    *itertools.product(("numpy", "mlx"), X_DTYPES, W_DTYPES),
    *itertools.product(("array_api_strict",), ("float32", "float64"), ("float32",)),  # it has no half precision
]


@pytest.fixture
def in_highest() -> Iterator[None]:
    """Precision "highest" within the test, whose bounds are float32's."""
    with qc.use_precision("highest"):
        yield


@pytest.mark.usefixtures("in_highest")
@pytest.mark.parametrize(("library", "x_dtype", "w_dtype"), PAIRS)
def test_result_dtype(library: str, x_dtype: str, w_dtype: str, libraries: dict[str, Any]) -> None:
    lib = libraries[library]
    x = random(3, 64, dtype=x_dtype)
    qw = qc.quantize(random(5, 64, dtype=w_dtype), group_size=32)
    operand, moved = lib.array(x), qw.to(library)
    expected = exact(x) @ exact(qw).T
    wanted = promoted(x_dtype, w_dtype)
    dense = moved.dequantize()
    for result in (
        qc.dot(operand, moved),
        qc.matmul(operand, moved.mT),
        qc.tensordot(operand, moved, axes=([1], [1])),
        qc.gather_dot(operand[None, ...], moved)[0, ...],
    ):
        found = lib.numpy(result)
        assert found.dtype == np.dtype(numpy_dtype(wanted))
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=HALVES[wanted], atol=20 * HALVES[wanted])
    for result in (
        qc.dot(moved, operand),
        qc.dot(operand, dense),
        qc.tensordot(operand, dense, axes=([1], [1])),
        qc.gather_dot(operand[None, ...], dense),
    ):
        assert lib.numpy(result).dtype == np.dtype(numpy_dtype(wanted))


@pytest.mark.usefixtures("in_highest")
@pytest.mark.parametrize(
    ("library", "out_dtype"), sorted({(library, dtype) for library, dtype, _ in PAIRS}), ids=lambda name: name
)
def test_out_dtype(library: str, out_dtype: str, libraries: dict[str, Any]) -> None:
    lib = libraries[library]
    x, qw = random(3, 64), weight(5, 64, group_size=32)
    operand, moved = lib.array(x), qw.to(lib.name)
    wanted = np.dtype(numpy_dtype(out_dtype))
    native = lib.array(np.zeros(1, wanted)).dtype
    for dtype in (out_dtype, native):
        for result in (
            qc.dot(operand, moved, out_dtype=dtype),
            qc.matmul(operand, moved.mT, out_dtype=dtype),
            qc.tensordot(operand, moved, axes=([1], [1]), out_dtype=dtype),
            qc.dot(operand, moved.dequantize(), out_dtype=dtype),
            qc.gather_dot(operand[None, ...], moved, out_dtype=dtype)[0, ...],
        ):
            found = lib.numpy(result)
            assert found.dtype == wanted
            np.testing.assert_allclose(
                found.astype(np.float64), exact(x) @ exact(qw).T, rtol=HALVES[out_dtype], atol=20 * HALVES[out_dtype]
            )
        assert lib.numpy(qc.take(moved, [1], out_dtype=dtype)).dtype == wanted


def test_contracted_batch_axes_round_to_half_only_at_the_end() -> None:
    x = random(64, 3, 32, dtype="float16")
    qw = qc.quantize(random(64, 5, 32, dtype="float16"), group_size=32)
    result = qc.tensordot(x, qw, axes=([0, 2], [0, 2]), precision="highest")
    expected = np.tensordot(exact(x), exact(qw), axes=([0, 2], [0, 2]))
    assert result.dtype == np.float16
    assert (np.abs(result - expected) <= np.spacing(np.abs(expected).astype(np.float16)) * 0.51).all()


def test_float64_computes_in_float64(lib: Any) -> None:
    x = random(3, 64).astype(np.float64) * (1 + 1e-12)
    qw = weight(5, 64)
    result = lib.numpy(qc.dot(lib.array(x), qw.to(lib.name)))
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, exact(x) @ exact(qw).T, rtol=1e-12, atol=1e-12)


# --- precision and backend ------------------------------------------------------------------------------------

BOUNDS = {"highest": 1e-12, "default": 1e-8, "fast": 1e-4}


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("flip", [False, True], ids=["grouped", "ungrouped"])
def test_precision_bounds_the_error_of_the_worst_row(lib: Any, precision: Any, flip: bool) -> None:
    x = random(4, 2048)
    x[1] *= 1e-4
    x[2] += 3
    x[3, ::7] *= 1000
    qw = weight(2048, 128, group_size=64).mT if flip else weight(96, 2048, group_size=64)
    w = exact(qw)
    result = lib.numpy(qc.dot(lib.array(x), qw.to(lib.name), precision=precision)).astype(np.float64)
    assert nmse(result, exact(x) @ w.T, exact(x), w) <= BOUNDS[precision]
    with qc.use_precision(precision):
        again = lib.numpy(qc.dot(lib.array(x), qw.to(lib.name))).astype(np.float64)
    assert nmse(again, exact(x) @ w.T, exact(x), w) <= BOUNDS[precision]


class Recorder:
    """A NumPy backend that notes what it is asked for."""

    def __init__(self, name: str = "recorder", priority: int = -10) -> None:
        self.info = qc.BackendInfo(
            api_version=1, name=name, library="numpy", array_types=("numpy:ndarray",), priority=priority
        )
        self.calls: list[tuple[str, str, str]] = []

    @qc.hookimpl
    def backend_info(self) -> qc.BackendInfo:
        return self.info

    @qc.hookimpl
    def supports(self, op: str, call: qc.Call) -> bool | str:
        return True

    @qc.hookimpl
    def quantize(self, w: Array, scheme: qc.Scheme) -> tuple[Array, Array, Array]:
        self.calls.append(("quantize", "", ""))
        return qc.quantize(w, scheme, pad=True, backend="numpy").flatten()[0]  # type: ignore[return-value]

    @qc.hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        self.calls.append(("dequantize", dtype, ""))
        return np.asarray(qc.dequantize(qw, dtype=dtype, backend="numpy"))

    @qc.hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        self.calls.append(("dot", dtype, precision))
        return np.asarray(qc.dot(x, qw, out_dtype=dtype, precision=precision, backend="numpy"))  # type: ignore[arg-type]


@pytest.fixture
def recorder(spoil: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    qc.register(made)
    return made


def test_backend_argument_chooses(recorder: Recorder) -> None:
    x, qw = random(3, 64), weight(5, 64)
    expected = qc.dot(x, qw)
    assert recorder.calls == []
    np.testing.assert_array_equal(qc.dot(x, qw, backend="recorder"), expected)
    qc.matmul(x, qw.mT, backend="recorder", precision="fast")
    qc.tensordot(x, qw, axes=([1], [1]), backend="recorder", out_dtype="float16", precision="highest")
    qc.dequantize(qw, backend="recorder")
    qc.quantize(random(3, 64), backend="recorder")
    assert recorder.calls == [
        ("dot", "float32", "default"),
        ("dot", "float32", "fast"),
        ("dot", "float16", "highest"),
        ("dequantize", "float32", ""),
        ("quantize", "", ""),
    ]
    with pytest.raises(qc.UnsupportedError, match="has no take"):
        qc.take(qw, [0], backend="recorder")


def test_contexts_choose_and_arguments_override_them(recorder: Recorder) -> None:
    x, qw = random(3, 64), weight(5, 64)
    with qc.use_backend("recorder"), qc.use_precision("fast"):
        qc.dot(x, qw)
        qc.dot(x, qw, precision="highest")
        qc.dot(x, qw, backend="numpy")
        with qc.use_precision("default"):
            qc.dot(x, qw)
        qc.dot(x, qw)
    qc.dot(x, qw)
    assert [precision for _, _, precision in recorder.calls] == ["fast", "highest", "default", "fast"]


def test_use_precision_is_per_thread(recorder: Recorder) -> None:
    x, qw = random(3, 64), weight(5, 64)
    with qc.use_precision("highest"):
        thread = threading.Thread(target=lambda: qc.dot(x, qw, backend="recorder"))
        thread.start()
        thread.join()
        qc.dot(x, qw, backend="recorder")
    assert [call[2] for call in recorder.calls] == ["default", "highest"]


def test_use_precision_refuses_unknown_ones_and_restores() -> None:
    with pytest.raises(ValueError, match=r"'default', 'highest', 'fast'.*'exact'"), qc.use_precision("exact"):  # type: ignore[arg-type]
        pytest.fail("entered")
    with pytest.raises(RuntimeError), qc.use_precision("fast"):
        raise RuntimeError
    assert "precision 'default'" in qc.explain("dot", random(3, 64), weight(5, 64)).request


# --- take -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [3, [0], [4, 0, 4], [-1, -5], [[0, 1], [2, 3]], [], (2, 1)], ids=str)
def test_take_of_rows(lib: Any, indices: Any) -> None:
    qw = weight(5, 50, bits=3)
    dense = exact(qw)
    where = np.asarray(indices, np.int64)
    moved = qw.to(lib.name)
    for given_indices in (indices, lib.array(where), lib.array(where.astype(np.int32))):
        result = lib.numpy(qc.take(moved, given_indices))
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, np.take(dense, where, axis=0).astype(np.float32))
    np.testing.assert_array_equal(lib.numpy(qc.take(moved.dequantize(), lib.array(where))), dense[where])


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -2, -3, -4])
@pytest.mark.parametrize("flip", [False, True], ids=["grouped last", "grouped axis -2"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_take_along_any_ungrouped_axis(lib: Any, axis: int, flip: bool, shape: tuple[int, ...]) -> None:
    qw = weight(2, 3, 5, 32)
    if flip:
        qw = qw.mT
    if axis % 4 == (2 if flip else 3):
        with pytest.raises(ValueError, match="grouped"):
            qc.take(qw.to(lib.name), 0, axis=axis)
        return
    where = np.random.default_rng(0).integers(-qw.shape[axis], qw.shape[axis], shape)
    result = lib.numpy(qc.take(qw.to(lib.name), lib.array(where), axis=axis))
    np.testing.assert_array_equal(result, np.take(exact(qw), where, axis=axis).astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_indices_of_every_integer_dtype(lib: Any, dtype: str) -> None:
    qw = weight(300, 32)
    where = np.asarray([0, 7, 120], dtype)
    moved, indices = qw.to(lib.name), lib.array(where)
    np.testing.assert_array_equal(lib.numpy(qc.take(moved, indices)), qw.dequantize()[[0, 7, 120]])
    stack = weight(300, 2, 16)
    x = random(1, 3, 16)
    result = lib.numpy(qc.gather_dot(lib.array(x), stack.to(lib.name), rhs_indices=indices))
    agree(result, exact(x) @ transposed(exact(stack)[[0, 7, 120]]))
    if dtype.startswith("int"):
        np.testing.assert_array_equal(
            lib.numpy(qc.take(moved, lib.array(np.asarray([-1], dtype)))), qw.dequantize()[[-1]]
        )
        result = lib.numpy(
            qc.gather_dot(lib.array(x), stack.to(lib.name), rhs_indices=lib.array(np.asarray([-1], dtype)))
        )
        agree(result, exact(x) @ transposed(exact(stack)[[-1]]))


@pytest.mark.parametrize("indices", [[5], [-6], [0, 100], 7])
def test_take_out_of_range(lib: Any, indices: Any) -> None:
    qw = weight(5, 32).to(lib.name)
    with pytest.raises(IndexError, match=r"take.*length 5"):
        qc.take(qw, indices)  # a list is looked at, whatever the library
    if lib.name != "mlx":
        with pytest.raises(IndexError, match=r"take.*\(5, 32\).*affine-int4-g16"):
            qc.take(qw, lib.array(np.atleast_1d(indices)))


# --- gather_dot -----------------------------------------------------------------------------------------------


def gathered(x: Array, w: Array, lhs: Array, rhs: Array) -> Array:
    """What gather_dot means, in float64."""
    left = x.reshape(-1, *x.shape[-2:])
    right = w.reshape(-1, *w.shape[-2:])
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    return np.matmul(left[lhs], np.swapaxes(right[rhs], -1, -2))


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("flip", [False, True], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        (None, [0, 3, 3, 1, 2, 0]),
        ([0, 0, 5], [2, 2, -1]),
        ([[0], [1]], [0, 1, 2]),
        ([3], None),
        ([-1, -6], [-4, 3]),
        ([], []),
    ],
    ids=str,
)
def test_gather_dot(lib: Any, lhs: Any, rhs: Any, flip: bool, group_size: int) -> None:
    x = random(2, 3, 4, 32)
    qw = weight(4, 32, 64, group_size=group_size).mT if flip else weight(4, 5, 32, group_size=group_size)
    left = np.arange(6).reshape(2, 3) if lhs is None else np.asarray(lhs, np.int64)
    right = np.arange(4) if rhs is None else np.asarray(rhs, np.int64)
    if lhs is None:
        right = right.reshape(2, 3)
        rhs = right.tolist()
    expected = gathered(exact(x), exact(qw), left, right)
    moved, operand = qw.to(lib.name), lib.array(x)
    agree(lib.numpy(qc.gather_dot(operand, moved, lhs, rhs)), expected)
    as_arrays = [None if given is None else lib.array(np.asarray(given, np.int64)) for given in (lhs, rhs)]
    agree(lib.numpy(qc.gather_dot(operand, moved, *as_arrays)), expected)
    agree(lib.numpy(qc.gather_dot(operand, moved.dequantize(), *as_arrays)), expected)


def test_gather_dot_without_indices_pairs_matrices_with_weights(lib: Any) -> None:
    x, qw = random(3, 4, 32), weight(3, 5, 32)
    agree(lib.numpy(qc.gather_dot(lib.array(x), qw.to(lib.name))), exact(x) @ transposed(exact(qw)))


def test_gather_dot_with_one_weight_and_with_one_matrix(lib: Any) -> None:
    x, qw = random(3, 4, 32), weight(5, 32)
    agree(lib.numpy(qc.gather_dot(lib.array(x), qw.to(lib.name))), exact(x) @ exact(qw).T)
    one = weight(1, 5, 32)
    agree(lib.numpy(qc.gather_dot(lib.array(x), one.to(lib.name))), exact(x) @ exact(one)[0].T)
    stack = weight(2, 5, 32)
    y = random(4, 32)
    agree(lib.numpy(qc.gather_dot(lib.array(y), stack.to(lib.name))), exact(y) @ transposed(exact(stack)))


def test_gather_dot_has_the_semantics_of_mlx(libraries: dict[str, Any]) -> None:
    mx = libraries["mlx"].module
    x, qw = random(6, 1, 64), weight(4, 3, 64, group_size=32)
    moved = qw.to("mlx")
    for lhs, rhs in [(None, [0, 1, 3, 3, 2, 0]), ([5, 5], [0, 3]), ([[0], [1]], [0, 1, 2]), ([0, 1, 2, 3], None)]:
        left, right = (None if given is None else mx.array(given, dtype=mx.uint32) for given in (lhs, rhs))
        theirs = mx.gather_qmm(
            mx.array(x), *moved.flatten()[0], lhs_indices=left, rhs_indices=right, transpose=True, group_size=32, bits=4
        )
        ours = qc.gather_dot(mx.array(x), moved, left, right)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        agree(qc.gather_dot(x, qw, lhs, rhs), np.asarray(theirs).astype(np.float64))


@pytest.mark.parametrize(("lhs", "rhs"), [([3], [0]), ([0], [4]), ([-4], [0]), ([0, 1], [0, 99])])
def test_gather_dot_out_of_range(lib: Any, lhs: list[int], rhs: list[int]) -> None:
    x, qw = random(3, 2, 32), weight(4, 5, 32)
    operand, moved = lib.array(x), qw.to(lib.name)
    with pytest.raises(IndexError, match="gather_dot"):
        qc.gather_dot(operand, moved, lhs, rhs)
    if lib.name != "mlx":
        arrays = [lib.array(np.asarray(given)) for given in (lhs, rhs)]
        with pytest.raises(IndexError, match=r"gather_dot.*\(3, 2, 32\).*\(4, 5, 32\).*affine-int4-g16"):
            qc.gather_dot(operand, moved, *arrays)
        with pytest.raises(IndexError):
            qc.gather_dot(operand, moved.dequantize(), *arrays)


OUT_OF_RANGE = """
import numpy as np, mlx.core as mx, quantcore as qc
w = np.random.default_rng(0).standard_normal((4, 5, 64)).astype(np.float32)
x = mx.array(np.random.default_rng(1).standard_normal((3, 2, 64)).astype(np.float32))
inside = mx.array([0, 1])

def nan_where(result, outside):
    rows = np.isnan(np.asarray(result)).reshape(len(outside), -1)
    assert (rows.all(axis=1) == outside).all() and (rows.any(axis=1) == outside).all(), (rows, outside)

far = [0, 4, -4, -5, 10**9, 2**31 - 1, -(2**31)]
outside = np.asarray([False, True, False, True, True, True, True])
for group in (32, 16):
    for qw in (qc.quantize(w, group_size=group).to("mlx"), qc.quantize(w, group_size=group).to("mlx").mT):
        for weights in (qw, qw.dequantize()):
            nan_where(qc.take(weights, mx.array(far)), outside)
            if not qw.transposed:
                nan_where(qc.gather_dot(x, weights, mx.array([0]), mx.array(far)), outside)
    qw = qc.quantize(w, group_size=group).to("mlx")
    for weights in (qw, qw.dequantize()):
        bad = mx.array([0, 2, 3, -3, -4])
        nan_where(qc.gather_dot(x, weights, bad, mx.array([1])), np.asarray([False, False, True, False, True]))
        unsigned = mx.array([0, 3, 2**32 - 1], dtype=mx.uint32)
        nan_where(qc.take(weights, unsigned), np.asarray([False, False, True]))
        big = mx.array([0, 2**40, -(2**40)], dtype=mx.int64)
        nan_where(qc.take(weights, big), np.asarray([False, True, True]))
    empty = qw[0:0]
    nan_where(qc.take(empty, inside), np.asarray([True, True]))
    nan_where(qc.take(empty.dequantize(), inside), np.asarray([True, True]))
    nan_where(qc.gather_dot(x, empty, mx.array([0, 1]), inside), np.asarray([True, True]))
print("survived")
"""


def test_out_of_range_in_mlx_is_nan_and_never_a_crash() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OUT_OF_RANGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "survived"


# --- nothing at all -------------------------------------------------------------------------------------------

EMPTY = """
import itertools, sys, warnings
import numpy as np, quantcore as qc
warnings.simplefilter("ignore")
library = sys.argv[1]
move = lambda array: qc.to_library(array, library)
count = 0
for group, stack, rows, m in itertools.product((16, 32), ((), (0,), (2,), (1, 0)), (0, 3), (0, 2)):
    w = np.ones((*stack, rows, 64), np.float32)
    qw = qc.quantize(move(w), group_size=group)
    assert tuple(qw.dequantize().shape) == w.shape
    for weight in (qw, qw.mT):
        for x_stack in {(), stack, (1,), (0,) if stack in ((), (1,), (0,)) else ()}:
            x = np.ones((*x_stack, m, weight.shape[-1]), np.float32)
            try:
                shape = np.matmul(x, np.ones(weight.mT.shape)).shape
            except ValueError:
                continue
            result = qc.dot(move(x), weight)
            assert tuple(result.shape) == shape, (x.shape, weight.shape, result.shape)
            if weight.shape[-1] == 0:
                assert (np.asarray(qc.to_library(result, "numpy")) == 0).all()
            count += 1
            assert tuple(qc.matmul(move(x), weight.mT).shape) == shape
            assert tuple(qc.dot(weight, move(x)).shape) == np.matmul(np.ones(weight.shape), x.swapaxes(-1, -2)).shape
            shape = np.tensordot(x, np.ones(weight.shape), axes=([-1], [-1])).shape
            assert tuple(qc.dot(move(x), weight, axes=([-1], [-1])).shape) == shape
        vector = np.ones(weight.shape[-1], np.float32)
        assert tuple(qc.dot(move(vector), weight).shape) == weight.shape[:-1]
        gathered = qc.gather_dot(move(np.ones((2, m, weight.shape[-1]), np.float32)), weight, [], [])
        assert tuple(gathered.shape) == (0, m, weight.shape[-2])
    if rows or stack:
        assert tuple(qc.take(qw, []).shape) == (0, *qw.shape[1:])
    if qw.shape[0] == 0:
        try:
            qc.take(qw, [0])
        except IndexError:
            count += 1
print(count)
"""


@pytest.mark.parametrize("library", ["numpy", "mlx", "array_api_strict"])
def test_empty_operands_crash_nothing(library: str) -> None:
    done = subprocess.run([sys.executable, "-c", EMPTY, library], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert int(done.stdout) > 60


def test_one_element_axes(lib: Any) -> None:
    x, qw = random(1, 1, 1), weight(1, 1, 1)
    agree(lib.numpy(qc.dot(lib.array(x), qw.to(lib.name))), exact(x) @ transposed(exact(qw)))


def test_strided_read_only_and_byte_swapped_operands() -> None:
    x, qw = random(6, 64), weight(5, 64)
    expected = qc.dot(x, qw)
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.repeat(np.repeat(x, 2, 0), 2, 1)[::2, ::2]
    for odd in (np.asfortranarray(x), x.astype(">f4"), frozen, wide, x[::-1][::-1]):
        np.testing.assert_allclose(qc.dot(odd, qw), expected, rtol=1e-6, atol=1e-6)
    leaves, rebuild = qw.flatten()
    for change in (np.asfortranarray, lambda a: a.astype(a.dtype.newbyteorder()), lambda a: np.repeat(a, 2, 0)[::2]):
        odd_weight = rebuild([change(leaf) for leaf in leaves])
        np.testing.assert_array_equal(odd_weight.dequantize(), qw.dequantize())
        np.testing.assert_allclose(qc.dot(x, odd_weight), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            qc.dot(random(6, 5), odd_weight.mT), qc.dot(random(6, 5), qw.mT), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_array_equal(qc.take(odd_weight, [1, 2]), qw.dequantize()[1:3])


def test_inputs_are_never_written_to(lib: Any) -> None:
    x, qw = random(3, 64), weight(5, 64).to(lib.name)
    operand = lib.array(x.copy())
    before = [lib.numpy(leaf).tobytes() for leaf in qw.flatten()[0]]
    qc.dot(operand, qw)
    qc.dot(lib.array(random(3, 5)), qw.mT)
    qc.take(qw, [0])
    qw.dequantize()
    assert lib.numpy(operand).tobytes() == x.tobytes()
    assert [lib.numpy(leaf).tobytes() for leaf in qw.flatten()[0]] == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_output_is_nonfinite_exactly_where_the_float_product_is(lib: Any) -> None:
    x, qw = random(6, 64), weight(5, 64, group_size=32)
    x[1, 3], x[2, 40], x[3, 0], x[4, :] = np.nan, np.inf, -np.inf, 3e38
    with np.errstate(all="ignore"):
        expected = x @ qw.dequantize().T
    result = lib.numpy(qc.dot(lib.array(x), qw.to(lib.name)))
    np.testing.assert_array_equal(np.isfinite(result[[0, 1, 2, 3, 5]]), np.isfinite(expected[[0, 1, 2, 3, 5]]))
    np.testing.assert_array_equal(np.isnan(result[:4]), np.isnan(expected[:4]))


def test_subclasses_of_ndarray_are_arrays() -> None:
    class Tagged(np.ndarray[Any, Any]):
        pass

    x, qw = random(3, 64), weight(5, 64)
    np.testing.assert_array_equal(qc.dot(x.view(Tagged), qw), qc.dot(x, qw))


def test_dense_operands_give_what_numpy_gives(lib: Any) -> None:
    x, w = random(2, 3, 4), random(5, 4)
    agree(lib.numpy(qc.dot(lib.array(x), lib.array(w))), exact(x) @ exact(w).T)
    agree(lib.numpy(qc.matmul(lib.array(x), lib.array(w.T.copy()))), exact(x) @ exact(w).T)
    assert float(qc.matmul(lib.array(x[0, 0]), lib.array(x[1, 0]))) == pytest.approx(float(x[0, 0] @ x[1, 0]))
    assert qc.dot(lib.array(x[0, 0]), lib.array(x[1, 0])).shape == ()


def test_masked_arrays_are_refused_and_not_read_through() -> None:
    masked = np.ma.masked_invalid(np.ones((4, 64), np.float32))
    with pytest.raises(TypeError, match=r"quantize.*MaskedArray"):
        qc.quantize(masked)
    with pytest.raises(TypeError, match=r"dot.*MaskedArray"):
        qc.dot(masked, qc.quantize(np.ones((4, 64), np.float32)))
