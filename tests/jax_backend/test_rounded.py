"""Products inside jit with x rounded: integers where they serve, floats where they don't, and the checks before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantcore as qc
from quantcore.scheme import BITS
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import integer
from quantcore_backends.jax_backend import routes
from quantcore_backends.jax_backend.door import layer_dot
from quantcore_backends.jax_backend.ffi import targets
from quantcore_backends.jax_backend.ffi.block import SPEC

BOUNDS = {"highest": 1e-12, "default": 1e-8, "fast": 1e-4}

_dot = jax.jit(qc.dot, static_argnames=("precision", "out_dtype"))


def weight(shape: tuple[int, ...], scheme: str, dtype: Any = np.float32) -> tuple[Any, Any]:
    """A weight in NumPy's arrays, and its exact value."""
    w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    qw = qc.quantize(w, scheme, pad=True)
    return qw, oracle.exact_weight(*qw.flatten()[0], qw.scheme, shape[-1])


def inputs(*shape: int) -> Any:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def nmse(actual: Any, true: Any) -> float:
    return float(((np.asarray(actual, np.float64) - true) ** 2).sum() / (true**2).sum())


def run(x: Any, qw: Any, precision: str) -> Any:
    return np.asarray(_dot(jnp.asarray(x), qw.to("jax"), precision=precision))


def test_the_table_of_kernels() -> None:
    groups, row = qc.Scheme(bits=4, group_size=64), qc.Scheme(bits=4, group_size=None)

    def kernel(precision: str, scheme: Any, rows: int, along_rows: bool = False) -> str:
        return routes._kernel(precision, routes._sharing(scheme, along_rows), rows)

    for precision in ("default", "fast"):
        assert {kernel(precision, scheme, rows) for scheme in (groups, row) for rows in (1, 5, 1000)} == {"rounded"}
        assert kernel(precision, groups, 1, True) == "few_rows"
        assert kernel(precision, groups, 13, True) == "tiles"
        assert kernel(precision, qc.Scheme(bits=1, group_size=16), 12) == "few_rows"
        assert kernel(precision, qc.Scheme(bits=1, group_size=16), 13) == "tiles"
    assert {kernel("highest", groups, rows) for rows in (1, 5, 1000)} == {"rounded"}
    assert kernel("highest", row, 1000) == "few_rows"


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
@pytest.mark.parametrize(
    ("shape", "scheme", "dtype"),
    [
        ((70, 256), "affine-int4-g64", np.float32),
        ((70, 300), "affine-int3-g32", np.float32),
        ((3, 40), "affine-int3-g16", np.float32),
        ((9, 513), "affine-int2-g256", np.float16),
        ((35, 300), "affine-int1-g128", np.float16),
        ((33, 192), "affine-int5-g16", np.float16),
        ((40, 320), "affine-int6-g64", jnp.bfloat16),
        ((70, 190), "affine-int4-g32", jnp.bfloat16),
        ((5, 70), "affine-int8-row", np.float32),
        ((1, 7), "affine-int4-row", np.float32),
    ],
)
def test_errors_stay_in_their_bounds(
    shape: tuple[int, ...], scheme: str, dtype: Any, rows: int, precision: str
) -> None:
    qw, exact = weight(shape, scheme, dtype)
    x = inputs(rows, shape[-1])
    made = _dot(jnp.asarray(x), qw.to("jax"), precision=precision, out_dtype="float32")
    true = oracle.product(x, exact)
    assert oracle.nmse(np.asarray(made, np.float64) - true, true, x, exact) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("rows", [2, 5, 8, 9, 32, 33, 128, 512])
def test_the_same_as_numpy(rows: int, precision: str) -> None:
    """The same kernels on the same integers; with threads too."""
    qw, exact = weight((600, 1024), "affine-int4-g64")
    x = inputs(rows, 1024)
    made = run(x, qw, precision)
    if precision == "highest" and rows <= integer.UNTILED_ROWS and not integer.has_wide(qw.scheme):
        assert nmse(made, x.astype(float) @ exact.T) <= BOUNDS[precision]
    else:
        np.testing.assert_array_equal(made, qc.dot(x, qw, precision=precision))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_many_rows_are_the_same_as_numpys(bits: int, dtype: str) -> None:
    """In tiles, with a last block that isn't full, a short last group, and rows whose end is copied."""
    for group in (16, 64, 128, None):
        scheme = qc.Scheme("affine", bits, group)
        if not integer.serves(scheme):
            continue
        qw, _ = weight((37, 200), str(scheme), jnp.dtype(dtype))
        x = inputs(7, 200)
        made = np.asarray(_dot(jnp.asarray(x), qw.to("jax"), out_dtype="float32"))
        np.testing.assert_array_equal(made, qc.dot(x, qw, out_dtype="float32"))


@pytest.mark.parametrize("precision", ["default", "fast"])
def test_more_rows_than_are_done_in_one_go(precision: str) -> None:
    """Of the second go one row is left; only in the first, 8 bits don't serve."""
    qw, _ = weight((40, 128), "affine-int4-g64")
    x = inputs(integer.MOST + 1, 128)
    np.testing.assert_allclose(run(x, qw, precision), qc.dot(x, qw, precision=precision), rtol=1e-3, atol=1e-3)
    x[3] = 0
    x[3, ::64] = 1e9
    x[3, 1::64] = 1e4
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, 128)
    true = oracle.product(x, exact)
    assert oracle.nmse(np.asarray(run(x, qw, precision), np.float64) - true, true, x, exact) <= BOUNDS[precision]


@pytest.mark.parametrize("rows", [3, 7, 40])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("case", ["outlier", "tiny", "huge", "zero", "one"])
def test_x_that_integers_do_not_serve(case: str, precision: str, rows: int) -> None:
    qw, exact = weight((9, 512), "affine-int4-g64")
    x = inputs(rows, 512)
    x[-1] = {
        "outlier": np.where(np.arange(512) % 97 == 5, 1000 * x[-1], x[-1]),
        "tiny": x[-1] * np.float32(1e-25),
        "huge": x[-1] * np.float32(1e30),
        "zero": 0 * x[-1],
        "one": np.where(np.arange(512) == 70, np.float32(3), np.float32(0)),
    }[case]
    true = oracle.product(x, exact)
    assert oracle.nmse(np.asarray(run(x, qw, precision), np.float64) - true, true, x, exact) <= BOUNDS[precision]


@pytest.mark.parametrize("precision", ["default", "fast"])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_an_outlier_is_left_to_floats(rows: int, precision: str) -> None:
    """Integers would lose the rest of its run."""
    qw, exact = weight((70, 256), "affine-int4-g64")
    x = inputs(rows, 256)
    x[-1, 5] = 1e9
    assert nmse(run(x, qw, precision), x.astype(float) @ exact.T) <= BOUNDS["highest"]
    # where 8 bits lose too much, 16 follow
    x[-1, 5] = 60
    if precision == "fast" and integer.has_byte_dot(qw.scheme):
        assert nmse(run(x, qw, "fast"), x.astype(float) @ exact.T) <= BOUNDS["default"]


@pytest.mark.parametrize("rows", [3, 14])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_results_are_not_finite_where_those_of_floats_are_not(value: float, precision: str, rows: int) -> None:
    qw, exact = weight((33, 128), "affine-int4-g32")
    x = inputs(rows, 128)
    x[1, 7] = value
    made = run(x, qw, precision)
    with np.errstate(all="ignore"):
        true = (x.astype(float) @ exact.T).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(made), np.isnan(true))
    np.testing.assert_array_equal(np.isinf(made), np.isinf(true))
    others = np.arange(rows) != 1
    assert nmse(made[others], x[others].astype(float) @ exact.T) <= BOUNDS[precision]


def test_infinities_of_both_signs() -> None:
    """A sum of theirs is infinite or NaN as the elements of the weight have other signs or the same."""
    qw, _ = weight((33, 128), "affine-int4-g32")
    x = inputs(6, 128)
    x[1, 7], x[1, 90] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        true = x[1] @ qw.dequantize().T
    assert np.isnan(true).any()
    assert np.isinf(true).any()
    np.testing.assert_array_equal(run(x, qw, "default")[1], true)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("precision", BOUNDS)
def test_an_overflow_is_left_to_floats(precision: str, rows: int) -> None:
    """Integers serve x, but a sum of the float32 kernel overflows; scales of one row are not finite."""
    qw, exact = weight((8, 64), "affine-int4-g64")
    packed, scales, biases = (np.array(leaf) for leaf in qw.flatten()[0])
    scales[3] = np.inf
    broken = qc.quantized_tensor(packed, scales, biases, (8, 64), qw.scheme)
    x = inputs(rows, 64)
    made = run(x, broken, precision)
    finite = np.arange(8) != 3
    assert not np.isfinite(made[:, 3]).any()
    assert nmse(made[:, finite], x.astype(float) @ exact.T[:, finite]) <= BOUNDS[precision]


@pytest.mark.parametrize("rows", [2, 6, 130])
@pytest.mark.parametrize("precision", BOUNDS)
def test_stacks_and_chosen_weights(precision: str, rows: int) -> None:
    """Of 3 bits, where the last rows of each weight are copied; one product has an outlier, the others don't."""
    qw, exact = weight((4, 21, 96), "affine-int3-g32")
    x = inputs(4, rows, 96)
    x[2, 1, 3] = 1e7
    stack = qw.to("jax")
    true = np.einsum("emk,enk->emn", x.astype(float), exact)
    made = np.asarray(_dot(jnp.asarray(x), stack, precision=precision))
    for e in range(4):
        assert nmse(made[e], true[e]) <= (BOUNDS["highest"] if e == 2 else BOUNDS[precision])

    @jax.jit
    def chosen(x: Any, lhs: Any, rhs: Any) -> Any:
        return qc.gather_dot(x, stack, lhs, rhs, precision=precision)

    made = np.asarray(chosen(jnp.asarray(x), jnp.array([0, 1, 3]), jnp.array([3, 3, 0])))
    for got, i, j in zip(made, (0, 1, 3), (3, 3, 0), strict=True):
        assert nmse(got, x[i].astype(float) @ exact[j].T) <= BOUNDS[precision]

    layer = jax.jit(lambda x, i: layer_dot(x, stack, i, precision=precision))
    for i in (0, 3, -1):
        assert nmse(layer(jnp.asarray(x[0]), i), x[0].astype(float) @ exact[i].T) <= BOUNDS[precision]
    assert np.isnan(np.asarray(layer(jnp.asarray(x[0]), 4))).all()


def test_a_rounded_product_that_does_not_fit_gives_an_error_of_xlas() -> None:
    qw = weight((24, 128), "affine-int4-g64")[0].to("jax")
    leaves = tuple(leaf[None] for leaf in qw.flatten()[0])
    which = jnp.zeros(1, jnp.int32)
    for width, together in ((8, 2), (24, 1), (16, 0)):
        targets.load_rounded(qw.scheme, width, together)
    good = targets._spec("few_rows", qw.scheme, 128, "float32", 16)
    x = jnp.ones((1, 2, 128))

    def call(x: Any, *leaves: Any, shape: Any = (1, 2, 24), **changes: int) -> Any:
        spec = good.copy()
        for name, value in changes.items():
            spec[SPEC.index(name)] = value
        out = jax.ShapeDtypeStruct(shape, np.float32)
        return jax.block_until_ready(jax.ffi.ffi_call("quantcore_product", out)(x, *leaves, which, spec=spec))

    assert call(x, *leaves).shape == (1, 2, 24)
    for wrong in (
        lambda: call(x[..., :64], *leaves),
        lambda: call(x, *leaves, shape=(1, 24, 2)),
        lambda: call(x, leaves[0][:, :, :8], *leaves[1:]),
        lambda: call(x, leaves[0], leaves[1][:, :12], leaves[2]),
        lambda: call(x, *leaves, width=4),
        lambda: call(x, *leaves, width=-1),
        lambda: call(x, *leaves, along_rows=1),
        lambda: call(x, *leaves, bits=40),
        lambda: call(x, *leaves, bits=0),
        lambda: call(x, *leaves, kind=7),
        lambda: call(x, *leaves, kind=1),
        lambda: call(x, *leaves, group=1),
        lambda: call(x, *leaves, group=1 << 40),
        lambda: call(x, *leaves, span=1),
        lambda: call(x, *leaves, body=0),
        lambda: call(x, *leaves, body=900),
        lambda: call(x, *leaves, columns=-128),
    ):
        with pytest.raises(Exception, match="quantcore: "):
            wrong()


def test_no_products_at_all() -> None:
    """The target is safe with empty operands, though the primitive doesn't call it with any."""
    qw = weight((24, 128), "affine-int4-g64")[0].to("jax")
    leaves = tuple(leaf[None] for leaf in qw.flatten()[0])
    for products, rows in ((0, 2), (1, 0)):
        x, which = jnp.ones((products, rows, 128)), jnp.zeros(products, jnp.int32)
        made = targets.product(x, leaves, which, qw.scheme, 128, along_rows=False, width=16)
        assert made.shape == (products, rows, 24)
