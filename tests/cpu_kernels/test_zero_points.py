"""Of a weight that nobody can write to, with one zero point, products don't read biases; and nothing else changes."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcore as qc
from quantcore import Scheme
from quantcore.memory import freeze
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import KINDS, integer, products
from quantcore_backends.cpu_kernels.zero_points import common_zero_point

Array = np.ndarray[Any, Any]

BOUND = {"highest": 1e-12, "default": 1e-8, "fast": 1e-4}


def symmetric(
    scheme: Scheme, rows: int, columns: int, dtype: Any = np.float32, zero_point: int | None = None
) -> qc.QuantizedTensor:
    """Random codes and scales, and biases that make the middle code 0."""
    rng = np.random.default_rng(rows + scheme.bits)
    packed = rng.integers(0, 1 << 32, scheme.packed_shape((rows, columns)), np.uint32)
    scales = rng.uniform(-0.02, 0.02, scheme.scales_shape((rows, columns))).astype(dtype)
    zero_point = zero_point or 1 << (scheme.bits - 1)
    biases = (np.float32(-zero_point) * scales.astype(np.float32)).astype(dtype)
    freeze(scales)
    freeze(biases)
    return qc.quantized_tensor(packed, scales, biases, (rows, columns), scheme, dtype="float32")


def kept(qw: qc.QuantizedTensor) -> integer.Weight:
    """What was found out of a weight when it was first multiplied."""
    return products._weights[id(qw)][1]


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(3, 32, np.float16), (4, 64, np.float32), (8, 64, np.float32)],
    ids=str,
)
@pytest.mark.parametrize("rows_of_x", [1, 2, 7])
def test_results_are_the_same_to_the_last_bit(bits: int, group: int, dtype: Any, rows_of_x: int) -> None:
    qw = symmetric(Scheme("affine", bits, group), 131, 512, dtype)
    x = np.random.default_rng(rows_of_x).standard_normal((rows_of_x, 512)).astype(np.float32) + 1
    exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, 512)
    truth = oracle.product(x, exact)
    told = integer.Weight.of(qw.packed, qw.scales, qw.biases, qw.scheme, 512)
    for precision, bound in BOUND.items():
        result = qc.dot(x, qw, precision=precision)
        assert oracle.nmse(result - truth, truth, x, exact) <= bound
        assert kept(qw).zero_point == 1 << (bits - 1)
        expected = np.empty_like(result)
        served = products.multiply(x, rows_of_x, told, expected, precision)
        assert served == products.multiply(x, rows_of_x, kept(qw), np.empty_like(result), precision)
        assert served or precision == "highest"  # for few rows where the target has no dot of bytes
        if served:
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("rows_of_x", [1, 2, 7])
def test_biases_are_not_read(width: int, rows_of_x: int) -> None:
    qw = symmetric(Scheme("affine", 4, 64), 131, 512)
    x = np.random.default_rng(0).standard_normal((rows_of_x, 512)).astype(np.float32)
    unread = integer.Weight.of(qw.packed, qw.scales, np.full_like(qw.biases, np.nan), qw.scheme, 512, zero_point=8)
    read = integer.Weight.of(qw.packed, qw.scales, qw.biases, qw.scheme, 512)
    found, expected = (np.empty((rows_of_x, 131), np.float32) for _ in range(2))
    assert integer.multiply(x, rows_of_x, read, expected, width)
    assert integer.multiply(x, rows_of_x, unread, found, width)
    np.testing.assert_array_equal(found, expected)


def test_a_single_other_bias_counts() -> None:
    scheme = Scheme("affine", 4, 64)
    for row, group in ((0, 0), (0, 7), (130, 7)):
        qw = symmetric(scheme, 131, 512)
        biases = qw.biases.copy()
        biases[row, group] = np.nextafter(biases[row, group], np.float32(np.inf))
        changed = qc.quantized_tensor(qw.packed, qw.scales, biases, qw.shape, scheme)
        assert common_zero_point(qw.scales, qw.biases) == 8
        assert common_zero_point(changed.scales, changed.biases) == 0
        biases[row, group] = 1
        freeze(biases)
        x = np.ones((1, 512), np.float32)
        exact = oracle.exact_weight(qw.packed, qw.scales, biases, scheme, 512)
        truth = oracle.product(x, exact)
        assert oracle.nmse(qc.dot(x, changed) - truth, truth, x, exact) <= BOUND["default"]


@pytest.mark.parametrize("whole", [False, True], ids=["view", "whole"])
def test_what_can_be_written_to_is_read_each_time(whole: bool) -> None:
    qw = symmetric(Scheme("affine", 4, 64), 131, 512)
    biases = qw.biases.copy()
    view = biases[...]
    view.flags.writeable = False  # that of which it is a view can be written to
    changing = qc.quantized_tensor(qw.packed, qw.scales, biases if whole else view, qw.shape, qw.scheme)
    x = np.ones((1, 512), np.float32)
    np.testing.assert_array_equal(qc.dot(x, changing), qc.dot(x, qw))
    assert (kept(changing).zero_point, kept(qw).zero_point) == (0, 8)
    biases += 1
    np.testing.assert_allclose(qc.dot(x, changing), qc.dot(x, qw) + 512, rtol=1e-3)


@pytest.mark.parametrize(("top", "kind"), [(0.02, np.float16), (60000, np.float32)])
def test_scales_of_half_precision_beside_wider_biases_stay_unless_biases_are_beyond(top: float, kind: Any) -> None:
    scheme = Scheme("affine", 4, 64)
    qw = symmetric(scheme, 131, 512, np.float16)
    scales = (qw.scales.astype(np.float32) * (top / 0.02)).astype(np.float16)
    biases = np.float32(-8) * scales.astype(np.float32)
    freeze(scales)
    freeze(biases)
    mixed = qc.quantized_tensor(qw.packed, scales, biases, qw.shape, scheme)
    exact = oracle.exact_weight(qw.packed, scales, biases, scheme, 512)
    for rows_of_x in (1, 7):
        x = np.random.default_rng(0).standard_normal((rows_of_x, 512)).astype(np.float32)
        truth = oracle.product(x, exact)
        for precision, bound in BOUND.items():
            assert oracle.nmse(qc.dot(x, mixed, precision=precision) - truth, truth, x, exact) <= bound
    assert kept(mixed).zero_point == 8
    assert kept(mixed).geometry.kind == KINDS[np.dtype(kind)]


@pytest.mark.parametrize("zero_point", [1, 8, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_zero_points_that_are_found(zero_point: int, dtype: Any) -> None:
    qw = symmetric(Scheme("affine", 4, 64), 20, 256, dtype, zero_point)
    scales, biases = qw.scales.copy(), qw.biases.copy()
    assert common_zero_point(scales, biases) == zero_point
    scales[0], biases[0] = 0, 0  # a group of zeros has any
    assert common_zero_point(scales, biases) == zero_point
    biases[0] = 1
    assert common_zero_point(scales, biases) == 0


@pytest.mark.parametrize("factor", [0.0, -0.5, 8.0, -3.0, -7.0, -256.0, np.nan, np.inf])
def test_what_is_no_zero_point(factor: float) -> None:
    scales = np.random.default_rng(0).uniform(0.01, 0.02, (20, 4)).astype(np.float32)
    assert common_zero_point(scales, np.float32(factor) * scales) == 0


def test_weights_without_a_number_in_them_have_none() -> None:
    scales = np.ones((20, 4), np.float32)
    scales[3, 1] = np.nan
    assert common_zero_point(scales, -8 * scales) == 0
    assert common_zero_point(np.zeros_like(scales), np.zeros_like(scales)) == 0
    assert common_zero_point(np.ones((0, 4), np.float32), np.ones((0, 4), np.float32)) == 0
