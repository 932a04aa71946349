"""The part of the kit for take and gather_dot: slices and products of stacks by index."""

from typing import Any, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore.scheme import Scheme
from quantcore.testing import checks, oracle
from quantcore.testing.bench import Bench
from quantcore.testing.cases import DTYPES, FEW_SCHEMES, SCHEMES, Weight, activations, random_weight
from quantcore.testing.encoding_tests import check_decoded

__all__ = ["GatherDotTests", "TakeTests", "check_gather_dot", "check_take"]

Array: TypeAlias = np.ndarray[Any, Any]

_INDICES = {
    "some": [3, 0, 7],
    "one": [5],
    "none": [],
    "negative": [-1, 2, -8],
    "repeated": [4, 4, 4, 1],
    "2-D": [[1, 2, 3], [7, 6, 5]],
    "0-d": 6,
}


def check_take(
    bench: Bench,
    weight: Weight,
    indices: Array,
    axis: int = 0,
    given: Any = None,
    out_dtype: str | None = None,
) -> None:
    """Take on the backend, and compare with slices of the dense weight."""
    qw = bench.tensor(weight)
    dtype = out_dtype or weight.dtype
    bench.require_dtype(dtype)
    where = bench.array(indices) if given is None else given
    rows = bench.run(
        "take",
        lambda backend: qc.take(qw, where, axis=axis, out_dtype=out_dtype, backend=backend),
        qw,
        dtype=dtype,
    )
    check_decoded(bench, rows, weight, dtype, "take", lambda dense: oracle.take(dense, indices, axis))


class TakeTests:
    """``take``: the rows of the dense weight, bit for bit."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_take(self, bench: Bench, scheme: Scheme, dtype: str) -> None:
        """Every scheme and dtype."""
        weight = random_weight(scheme, (13, 2 * (scheme.group_size or 80)), dtype)
        check_take(bench, weight, np.asarray([3, 12, 0, 3]))

    @pytest.mark.parametrize("kind", ["int64", "int32", "uint32", "uint8"])
    @pytest.mark.parametrize("indices", _INDICES)
    def test_take_indices(self, bench: Bench, indices: str, kind: str) -> None:
        """Indices of any shape and integer dtype; negative ones count from the end."""
        values = np.asarray(_INDICES[indices])
        if values.size and values.min() < 0 and kind.startswith("u"):
            pytest.skip("unsigned indices aren't negative")
        check_take(bench, random_weight(Scheme(bits=4, group_size=32), (8, 64), "float32"), values.astype(kind))

    @pytest.mark.parametrize("given", [[2, -1], 3, [[1], [0]], []], ids=str)
    def test_take_python_indices(self, bench: Bench, given: Any) -> None:
        """Indices that are no array."""
        weight = random_weight(Scheme(bits=4, group_size=32), (8, 64), "float32")
        check_take(bench, weight, np.asarray(given, np.int64), given=given)

    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:5], ids=str)
    @pytest.mark.parametrize(
        ("leading", "axis", "transposed"),
        [
            ((3, 2), 0, False),
            ((3, 2), 1, False),
            ((3, 2), 2, False),
            ((3,), -2, False),
            ((3,), -1, True),
            ((), 1, True),
        ],
        ids=str,
    )
    def test_take_axes(
        self, bench: Bench, leading: tuple[int, ...], axis: int, transposed: bool, scheme: Scheme
    ) -> None:
        """Any ungrouped axis, of either orientation, with a short last group."""
        weight = random_weight(scheme, (*leading, 5, 2 * (scheme.group_size or 80) + 3), "float32")
        weight = weight.mT if transposed else weight
        check_take(bench, weight, np.asarray([1, 0, 1]), axis)

    @pytest.mark.parametrize("out_dtype", [*DTYPES, "float64"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_take_out_dtype(self, bench: Bench, dtype: str, out_dtype: str) -> None:
        """`out_dtype` overrides the weight's."""
        weight = random_weight(Scheme(bits=8, group_size=32), (8, 64), dtype)
        check_take(bench, weight, np.asarray([7, 1]), out_dtype=out_dtype)

    @pytest.mark.parametrize("index", [8, -9, 1 << 30])
    def test_take_out_of_range(self, bench: Bench, index: int) -> None:
        """IndexError; or, from a library that can't look, NaN in that place alone."""
        weight = random_weight(Scheme(bits=4, group_size=32), (8, 64), "float32")
        qw, where = bench.tensor(weight), bench.array(np.asarray([1, index, 2]))
        try:
            rows = bench.run("take", lambda backend: qc.take(qw, where, backend=backend), qw, dtype="float32")
            got = bench.numpy(rows)
        except IndexError:
            return
        assert np.isnan(got[1]).all(), f"index {index} of 8 rows gave {got[1][:4]}..., neither IndexError nor NaN"
        check_decoded(bench, rows[::2], weight, "float32", "take beside an index out of range", lambda w: w[1:3])


def check_gather_dot(
    bench: Bench,
    leading: tuple[int, ...],
    weight: Weight,
    lhs: Array | None,
    rhs: Array | None,
    precision: Any = None,
) -> None:
    """gather_dot on the backend, judged against float64."""
    dtype = weight.dtype
    x = activations("gaussian", (*leading, weight.exact.shape[-1]), dtype)
    operand, qw = bench.array(x), bench.tensor(weight)
    left, right = (None if which is None else bench.array(which) for which in (lhs, rhs))
    result = bench.run(
        "gather_dot",
        lambda backend: qc.gather_dot(operand, qw, left, right, precision=precision, backend=backend),
        operand,
        qw,
        dtype=dtype,
        precision=precision,
    )
    matrices, weights = (stack.shape[:-2] for stack in (x, weight.exact))
    left_all, right_all = (np.arange(np.prod(shape, dtype=int)).reshape(shape) for shape in (matrices, weights))
    which_x, which_w = np.broadcast_arrays(left_all if lhs is None else lhs, right_all if rhs is None else rhs)
    flat_x, flat_w = (
        stack.reshape(which.size, *stack.shape[-2:]) for stack, which in ((x, left_all), (weight.exact, right_all))
    )
    y = oracle.gather_product(x, weight.exact, which_x, which_w)
    half = dtype if dtype in checks.HALF_ROUNDOFF else None
    bench.check_product(result, y, flat_x[which_x], flat_w[which_w], dtype, precision or "default", half, "gather_dot")


class GatherDotTests:
    """``gather_dot`` against float64."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_gather_dot(self, bench: Bench, scheme: Scheme, dtype: str) -> None:
        """Every scheme and dtype."""
        weight = random_weight(scheme, (3, 10, 2 * (scheme.group_size or 80)), dtype)
        check_gather_dot(bench, (4, 2), weight, np.asarray([3, 0, 1]), np.asarray([2, 2, 0]))

    @pytest.mark.parametrize("transposed", [False, True], ids=["x@w.T", "x@w"])
    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:5], ids=str)
    @pytest.mark.parametrize(
        ("x", "stack", "lhs", "rhs"),
        [
            ((4, 1), (3,), [0, 1, 2, 3], [2, 0, 0, 1]),
            ((4, 7), (3,), [0, 1, 2, 3], [1, 1, 1, 1]),
            ((4, 1), (3,), [[0], [1], [2], [3]], [[2, 0], [0, 1], [2, 1], [0, 0]]),
            ((1, 2), (3,), [0], [0, 1, 2]),
            ((2, 2, 3), (2, 2), [3, 0], [[1], [3]]),
            ((4, 2), (3,), None, [2, 0, 0, 1]),
            ((3, 2), (3,), [2, 1, 0], None),
            ((3, 2), (3,), None, None),
            ((4, 2), (3,), [-1, 0], [-3, -1]),
            ((3, 2), (3,), [], []),
            ((3, 0), (3,), [1], [1]),
        ],
        ids=lambda value: "none" if value is None else str(value).replace(" ", ""),
    )
    def test_gather_dot_indices(
        self,
        bench: Bench,
        x: tuple[int, ...],
        stack: tuple[int, ...],
        lhs: Any,
        rhs: Any,
        scheme: Scheme,
        transposed: bool,
    ) -> None:
        """Flat indices that broadcast; None for all."""
        weight = random_weight(scheme, (*stack, 12, 2 * (scheme.group_size or 80)), "float32")
        weight = weight.mT if transposed else weight
        left, right = (None if which is None else np.asarray(which, np.int64) for which in (lhs, rhs))
        check_gather_dot(bench, x, weight, left, right)

    @pytest.mark.parametrize("precision", oracle.BOUNDS)
    def test_gather_dot_precision(self, bench: Bench, precision: str) -> None:
        """4096 contracted elements."""
        weight = random_weight(Scheme(bits=4, group_size=64), (2, 10, 4096), "float32")
        check_gather_dot(bench, (3, 2), weight, np.asarray([2, 0]), np.asarray([1, 1]), precision)

    @pytest.mark.parametrize(("lhs", "rhs"), [([0, 4], [0, 0]), ([0, 0], [0, 3])], ids=["x", "weight"])
    def test_gather_dot_out_of_range(self, bench: Bench, lhs: list[int], rhs: list[int]) -> None:
        """IndexError; or, from a library that can't look, NaN in that place alone."""
        weight = random_weight(Scheme(bits=4, group_size=32), (3, 6, 64), "float32")
        operand, qw = bench.array(activations("gaussian", (4, 2, 64), "float32")), bench.tensor(weight)
        left, right = bench.array(np.asarray(lhs)), bench.array(np.asarray(rhs))
        try:
            product = bench.run(
                "gather_dot",
                lambda backend: qc.gather_dot(operand, qw, left, right, backend=backend),
                operand,
                qw,
                dtype="float32",
            )
            got = bench.numpy(product)
        except IndexError:
            return
        assert np.isnan(got[1]).all(), "an index out of range gave numbers, neither IndexError nor NaN"
        assert np.isfinite(got[0]).all(), "an index out of range spoiled another product"
