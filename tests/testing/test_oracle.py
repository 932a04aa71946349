"""The oracle itself: against MLX's CPU kernels bit for bit, and against readings that are slower and plainer still."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from quantcore import Scheme
from quantcore.testing import oracle
from quantcore.testing.cases import exact_codes, groups_to_encode, random_weight

Array = np.ndarray[Any, Any]

BITS = [1, 2, 3, 4, 5, 6, 8]
DTYPES = ["float32", "float16", "bfloat16"]
RNG = np.random.default_rng(20260102)


def to_mlx(array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def from_mlx(array: Any) -> Array:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- against MLX on the CPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_is_mlx_quantize(dtype: str, bits: int, group: int) -> None:
    groups = groups_to_encode(bits, group, dtype)
    groups = {**groups, "many": (RNG.standard_normal((64, group)) * 3).astype(oracle.numpy_dtype(dtype))}
    for name, w in groups.items():
        ours = oracle.encode(w, Scheme(bits=bits, group_size=group))
        theirs = mx.quantize(to_mlx(w), group_size=group, bits=bits, stream=mx.cpu)
        for part, a, b in zip(("codes", "scales", "biases"), ours, map(from_mlx, theirs), strict=True):
            assert same_bits(a, b), f"{part} of {name} groups"


def test_the_groups_are_what_they_are_called() -> None:
    for dtype in DTYPES:
        groups = {name: w.astype(np.float64) for name, w in groups_to_encode(4, 64, dtype).items()}
        assert (groups["all-negative"] < 0).all()
        assert (groups["all-zero"] == 0).all()
        assert (np.ptp(groups["constant"], axis=-1) == 0).all()
        smallest_normal = 2.0**-14 if dtype == "float16" else 2.0**-126
        assert 0 < np.abs(groups["subnormal"]).max() < smallest_normal
        assert np.isfinite(groups["huge"]).all()
        scaled = groups["ties"][0] + 15
        assert (scaled % 1 == 0.5).sum() > 50


def test_codes_of_ties_are_even() -> None:
    values = np.asarray([-15, -14.5, -13.5, -12.5, -0.5, 0], np.float32)
    codes, scale, bias = oracle.encode_group(values, 4)
    assert (scale, bias) == (1, -15)
    assert codes.tolist() == [0, 0, 2, 2, 14, 15]


def test_one_bit_is_the_nearest_end_and_the_middle_the_lower_one() -> None:
    codes, scale, bias = oracle.encode_group(np.asarray([-1, 0, 1, 2, 3], np.float32), 1)
    assert (scale, bias) == (4, -1)
    assert codes.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_mlx_dequantize_in_float32_rounded_once(dtype: str, bits: int, group: int) -> None:
    weight = random_weight(Scheme(bits=bits, group_size=group), (33, 2 * group), dtype)
    packed, scales, biases = map(to_mlx, weight.leaves)
    theirs = mx.dequantize(
        packed,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=group,
        bits=bits,
        stream=mx.cpu,
    )
    assert same_bits(weight.dense("float32"), from_mlx(theirs))
    assert same_bits(weight.dense(dtype), from_mlx(theirs).astype(oracle.numpy_dtype(dtype)))


# --- the bitstream --------------------------------------------------------------------------------------------


def codes_of(row: Array, bits: int, count: int) -> list[int]:
    """Read a packed row as one big integer."""
    stream = sum(int(word) << (32 * i) for i, word in enumerate(row))
    return [(stream >> (bits * i)) % 2**bits for i in range(count)]


@pytest.mark.parametrize("count", [1, 7, 32, 80, 257])
@pytest.mark.parametrize("bits", BITS)
def test_decode_reads_one_little_endian_bitstream(bits: int, count: int) -> None:
    words = RNG.integers(0, 2**32, (3, -(-count * bits // 32)), np.uint32)
    expected = [codes_of(row, bits, count) for row in words]
    assert oracle.decode_codes(words, bits, count).tolist() == expected
    assert oracle.decode_codes(words.astype(">u4"), bits, count).tolist() == expected
    assert oracle.decode_codes(words[::-1], bits, count).tolist() == expected[::-1]


@pytest.mark.parametrize("count", [1, 7, 32, 80, 257])
@pytest.mark.parametrize("bits", BITS)
def test_packing_is_undone_and_leaves_spare_bits_zero(bits: int, count: int) -> None:
    codes = RNG.integers(0, 2**bits, (2, 3, count))
    packed = oracle.pack_codes(codes, bits)
    assert packed.dtype == np.uint32
    assert packed.shape == (2, 3, -(-count * bits // 32))
    assert np.array_equal(oracle.decode_codes(packed, bits, count), codes)
    spare = packed.shape[-1] * 32 - count * bits
    assert all(int(word) >> (32 - spare) == 0 for word in packed[..., -1].flat)


# --- decoding and products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, None])
def test_weights_are_code_times_scale_plus_bias_of_their_group(group: int | None) -> None:
    weight = random_weight(Scheme(bits=5, group_size=group), (2, 37), "float16")
    for n in range(2):
        codes = codes_of(weight.packed[n], 5, 37)
        for k in range(37):
            g = 0 if group is None else k // group
            scale, bias = weight.scales[n, g], weight.biases[n, g]
            assert weight.exact[n, k] == codes[k] * float(scale) + float(bias)
            rounded = np.float32(codes[k]) * np.float32(scale) + np.float32(bias)
            assert weight.dense("float16")[n, k] == np.float16(rounded)


def test_a_short_last_group_is_encoded_as_if_its_last_element_were_repeated() -> None:
    w = RNG.standard_normal((3, 37)).astype(np.float32)
    padded = np.concatenate([w, np.repeat(w[:, -1:], 11, axis=1)], axis=1)
    scheme = Scheme(bits=3, group_size=16)
    short, whole = oracle.encode(w, scheme), oracle.encode(padded, scheme)
    assert np.array_equal(short[1], whole[1])
    assert np.array_equal(short[2], whole[2])
    assert np.array_equal(oracle.decode_codes(short[0], 3, 37), oracle.decode_codes(whole[0], 3, 48)[:, :37])


def test_exact_codes_are_small_integers_with_zeros_among_them() -> None:
    for bits in BITS:
        weight = exact_codes(Scheme(bits=bits, group_size=32), (24, 64), "bfloat16")
        assert (weight.exact == np.rint(weight.exact)).all()
        assert (weight.exact == 0).any()
        assert np.array_equal(weight.dense("float32"), weight.exact)


@pytest.mark.parametrize(
    ("x_shape", "w_shape"), [((5,), (3, 5)), ((2, 5), (3, 5)), ((2, 1, 4, 5), (3, 6, 5)), ((5,), (2, 3, 5))]
)
def test_product_is_matmul_with_the_weight_transposed(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> None:
    x, w = RNG.standard_normal(x_shape), RNG.standard_normal(w_shape)
    np.testing.assert_allclose(oracle.product(x, w), x @ np.swapaxes(w, -1, -2), rtol=1e-12, atol=1e-12)


def test_product_keeps_what_is_not_finite() -> None:
    x = np.asarray([[np.inf, 1.0], [np.nan, 1.0], [np.inf, -np.inf], [1.0, 2.0]])
    w = np.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    nan, inf = np.nan, np.inf
    expected = [[inf, nan, -inf, inf], [nan] * 4, [nan, nan, -inf, nan], [1, 2, 1, 3]]
    np.testing.assert_array_equal(oracle.product(x, w), expected)


def test_gather_product_pairs_by_flat_index() -> None:
    x, w = RNG.standard_normal((2, 2, 3, 5)), RNG.standard_normal((4, 6, 5))
    lhs, rhs = np.asarray([3, 0]), np.asarray([[1], [2]])
    got = oracle.gather_product(x, w, lhs, rhs)
    assert got.shape == (2, 2, 3, 6)
    np.testing.assert_allclose(got[1, 0], x[1, 1] @ w[2].T)
    np.testing.assert_allclose(got[0, 1], x[0, 0] @ w[1].T)


@pytest.mark.parametrize(
    ("x", "w", "result"),
    [
        ("float16", "float16", "float16"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float64", "bfloat16", "float64"),
    ],
)
def test_product_dtype(x: str, w: str, result: str) -> None:
    assert oracle.product_dtype(x, w) == result


# --- the error ------------------------------------------------------------------------------------------------


def test_nmse_is_of_the_worst_row() -> None:
    x, w = RNG.standard_normal((4, 3, 8)), RNG.standard_normal((5, 8))
    y = oracle.product(x, w)
    error = RNG.standard_normal(y.shape) * 1e-3
    error[2, 1] *= 50
    rows = [
        sum(error[i, m] ** 2) / max(sum(y[i, m] ** 2), sum(x[i, m] ** 2) * sum(sum(w[n] ** 2) for n in range(5)) / 8)
        for i in range(4)
        for m in range(3)
    ]
    assert oracle.nmse(error, y, x, w) == pytest.approx(max(rows), rel=1e-12)
    assert oracle.nmse(error[0, 0], y[0, 0], x[0, 0], w) == pytest.approx(rows[0], rel=1e-12)


def test_nmse_of_a_stack_takes_each_weight_for_itself() -> None:
    x, w = RNG.standard_normal((2, 8)), np.stack([np.full((3, 8), 1.0), np.full((3, 8), 1e-3)])
    y = oracle.product(x, w)
    error = np.zeros_like(y)
    error[1, 0] = 1e-3
    alone = oracle.nmse(error[1], y[1], x, w[1])
    assert oracle.nmse(error, y, x, w) == pytest.approx(alone)
    assert alone > 1e-3


def test_nmse_of_cancelling_rows_is_measured_by_their_size() -> None:
    x, w = np.asarray([[1.0, -1.0]]), np.ones((1, 2))
    assert oracle.product(x, w) == 0
    assert oracle.nmse(np.asarray([[1e-3]]), np.zeros((1, 1)), x, w) == pytest.approx(1e-6 / (2 * 2 / 2))


def test_nmse_of_nothing_and_of_zeros() -> None:
    assert oracle.nmse(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 4)), np.ones((3, 4))) == 0
    assert oracle.nmse(np.zeros((2, 0)), np.zeros((2, 0)), np.ones((2, 4)), np.ones((0, 4))) == 0
    zeros = np.zeros((2, 4)), np.ones((3, 4))
    assert oracle.nmse(np.zeros((2, 3)), np.zeros((2, 3)), *zeros) == 0
    assert oracle.nmse(np.full((2, 3), 1e-9), np.zeros((2, 3)), *zeros) == math.inf


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_half_ulp_is_half_of_spacing(dtype: str) -> None:
    values = np.abs(RNG.standard_normal(99) * 10.0 ** RNG.integers(-9, 4, 99)).astype(dtype)
    np.testing.assert_array_equal(oracle.half_ulp(values, dtype), np.spacing(values).astype(np.float64) / 2)


def test_half_ulp_of_bfloat16() -> None:
    values = np.abs(RNG.standard_normal(99)).astype(ml_dtypes.bfloat16)
    above = (values.view(np.uint16) + 1).view(ml_dtypes.bfloat16)
    gaps = above.astype(np.float64) - values.astype(np.float64)
    np.testing.assert_array_equal(oracle.half_ulp(values, "bfloat16"), gaps / 2)


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"collections.abc", "math", "ml_dtypes", "numpy", "quantcore.scheme", "types", "typing"}


def test_the_oracle_needs_no_pytest() -> None:
    program = "import sys, quantcore.testing.oracle; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
