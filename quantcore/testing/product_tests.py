"""The part of the kit for products: dot both ways round, matmul and tensordot, against float64."""

import threading
from typing import Any, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore.scheme import Scheme
from quantcore.testing import checks, oracle
from quantcore.testing.bench import Bench
from quantcore.testing.cases import (
    ACTIVATIONS,
    DTYPES,
    FEW_SCHEMES,
    PAIRS,
    SCHEMES,
    SHAPES,
    Weight,
    activations,
    exact_codes,
    random_weight,
    rng,
)
from quantcore.testing.forms import FORMS, in_form

__all__ = ["ContractionTests", "DotTests", "both_ways", "check_dot"]

Array: TypeAlias = np.ndarray[Any, Any]

both_ways = pytest.mark.parametrize("transposed", [False, True], ids=["x@w.T", "x@w"])
"""The weight as it is stored, and its .mT: contracted along the groups, or along the rows."""

_PRECISE = tuple(Scheme(bits=bits, group_size=group) for bits, group in ((4, 64), (8, 32), (3, 128), (5, None)))
_PRECISELY = tuple(
    (precision, kind, _PRECISE[(i + j + k) % 4])
    for i, precision in enumerate(oracle.BOUNDS)
    for j, kind in enumerate(ACTIVATIONS)
    for k in (range(4) if kind == "gaussian" else (0, 2))
)
"""Every precision with every kind of activations; the schemes take turns."""


def check_dot(
    bench: Bench,
    x: Array,
    weight: Weight,
    *,
    precision: Any = None,
    out_dtype: str | None = None,
    form: Any = None,
    tensor: qc.QuantizedTensor | None = None,
    what: str = "dot",
) -> None:
    """One product on the backend, judged; one of half precision is judged in float32 as well."""
    operand = bench.array(x) if form is None else form
    qw = bench.tensor(weight) if tensor is None else tensor
    dtype = out_dtype or oracle.product_dtype(x.dtype.name, weight.dtype)
    bench.require_dtype(dtype)
    result = bench.run(
        "dot",
        lambda backend: qc.dot(operand, qw, precision=precision, out_dtype=out_dtype, backend=backend),
        operand,
        qw,
        dtype=dtype,
        precision=precision,
    )
    half = next((name for name in (x.dtype.name, weight.dtype) if name in checks.HALF_ROUNDOFF), None)
    y = oracle.product(x, weight.exact)
    bench.check_product(result, y, x, weight.exact, dtype, precision or "default", half, what)
    if dtype in checks.HALF_ROUNDOFF and out_dtype is None:
        check_dot(bench, x, weight, precision=precision, out_dtype="float32", form=form, tensor=tensor, what=what)


class DotTests:
    """``dot`` against float64."""

    @both_ways
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_dot(self, bench: Bench, scheme: Scheme, dtype: str, transposed: bool) -> None:
        """Every scheme with every dtype that x and the weight share; one row of x, a few, more."""
        weight = random_weight(scheme, (36, 2 * (scheme.group_size or 80)), dtype)
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 17):
            check_dot(bench, activations("gaussian", (rows, weight.exact.shape[-1]), dtype), weight)

    @both_ways
    @pytest.mark.parametrize(("scheme", "x_dtype", "w_dtype"), PAIRS, ids=str)
    def test_dot_of_unequal_dtypes(
        self, bench: Bench, scheme: Scheme, x_dtype: str, w_dtype: str, transposed: bool
    ) -> None:
        """The result has the dtype of the project's table, whatever the library would promote to."""
        weight = random_weight(scheme, (20, 2 * (scheme.group_size or 80)), w_dtype)
        weight = weight.mT if transposed else weight
        for rows in (1, 5):
            check_dot(bench, activations("gaussian", (rows, weight.exact.shape[-1]), x_dtype), weight)

    @both_ways
    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:6], ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_dot_shapes(self, bench: Bench, shape: str, scheme: Scheme, transposed: bool) -> None:
        """1-D x, batches, stacks that broadcast, ragged rows, empty and size-1 axes."""
        x_shape, w_shape = SHAPES[shape].of(scheme, transposed)
        weight = random_weight(scheme, w_shape, "float32")
        weight = weight.mT if transposed else weight
        check_dot(bench, activations("gaussian", x_shape, "float32"), weight, what=shape)

    @both_ways
    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:6], ids=str)
    def test_dot_is_right_for_square_weights(self, bench: Bench, scheme: Scheme, transposed: bool) -> None:
        """Where no shape gives an orientation away."""
        side = scheme.group_size or 80
        weight = random_weight(scheme, (side, side), "float32")
        weight = weight.mT if transposed else weight
        for rows in (1, side):
            check_dot(bench, activations("gaussian", (rows, side), "float32"), weight)

    @both_ways
    @pytest.mark.parametrize(("precision", "kind", "scheme"), _PRECISELY, ids=str)
    def test_dot_precision(self, bench: Bench, precision: str, kind: str, scheme: Scheme, transposed: bool) -> None:
        """4096 contracted elements, activations of every kind: the error bound of each precision."""
        grouped = scheme.group_size or 96
        weight = random_weight(scheme, (4096, grouped) if transposed else (40, 4096), "float32")
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 17):
            check_dot(bench, activations(kind, (rows, 4096), "float32"), weight, precision=precision, what=kind)

    @both_ways
    @pytest.mark.parametrize("scheme", _PRECISE[:3], ids=str)
    @pytest.mark.parametrize("kind", ["gaussian", "outliers 1000x", "offset"])
    @pytest.mark.parametrize("precision", oracle.BOUNDS)
    def test_dot_precision_of_short_rows(
        self, bench: Bench, precision: str, kind: str, scheme: Scheme, transposed: bool
    ) -> None:
        """The same over 512 contracted elements, for backends that take no more at the highest precision."""
        weight = random_weight(scheme, (512, 128) if transposed else (40, 512), "float32")
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 17):
            check_dot(bench, activations(kind, (rows, 512), "float32"), weight, precision=precision, what=kind)

    @both_ways
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
    def test_dot_half_precision(self, bench: Bench, dtype: str, kind: str, transposed: bool) -> None:
        """Half-precision results over 4096 elements add their last rounding to the bound, and nothing else."""
        weight = random_weight(Scheme(bits=4, group_size=64), (4096, 64) if transposed else (40, 4096), dtype)
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 17):
            check_dot(bench, activations(kind, (rows, 4096), dtype), weight, what=kind)

    @both_ways
    @pytest.mark.parametrize("rows", [1, 3, 17])
    def test_dot_of_long_rows(self, bench: Bench, rows: int, transposed: bool) -> None:
        """Ten thousand contracted elements, with a short last group."""
        scheme = Scheme(bits=4, group_size=32)
        weight = random_weight(scheme, (10_007, 32) if transposed else (9, 10_007), "float32")
        weight = weight.mT if transposed else weight
        check_dot(bench, activations("gaussian", (rows, 10_007), "float32"), weight)

    @both_ways
    @pytest.mark.parametrize("x_dtype", ["float32", "float16", "float64"])
    @pytest.mark.parametrize("out_dtype", [*DTYPES, "float64"])
    def test_dot_out_dtype(self, bench: Bench, out_dtype: str, x_dtype: str, transposed: bool) -> None:
        """`out_dtype` overrides the table."""
        weight = random_weight(Scheme(bits=4, group_size=64), (64, 128), "float32")
        weight = weight.mT if transposed else weight
        check_dot(bench, activations("gaussian", (3, weight.exact.shape[-1]), x_dtype), weight, out_dtype=out_dtype)

    @both_ways
    @pytest.mark.parametrize("rows", [1, 7])
    def test_dot_of_float64_is_computed_in_float64(self, bench: Bench, rows: int, transposed: bool) -> None:
        """A float64 x isn't narrowed on the way; where a backend can't, `supports` says so."""
        weight = exact_codes(Scheme(bits=4, group_size=64), (64, 128), "float32")
        weight = weight.mT if transposed else weight
        x = rng("float64").standard_normal((rows, weight.exact.shape[-1]))
        operand, qw = bench.array(x), bench.tensor(weight)
        result = bench.run("dot", lambda backend: qc.dot(operand, qw, backend=backend), operand, qw, dtype="float64")
        y = oracle.product(x, weight.exact)
        error = oracle.nmse(bench.numpy(result) - y, y, x, weight.exact)
        assert error < 1e-24, f"NMSE {error:.1e}: the product wasn't computed in float64"

    @both_ways
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.inf, np.nan]], ids=str)
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_dot_of_what_is_not_finite(self, bench: Bench, values: list[float], dtype: str, transposed: bool) -> None:
        """NaN and infinities of x come out where the float product has them, and touch no other row."""
        for scheme in FEW_SCHEMES[:4]:
            weight = exact_codes(scheme, (24, 2 * (scheme.group_size or 80)), dtype)
            weight = weight.mT if transposed else weight
            for rows in (1, 3, 6):
                x = activations("gaussian", (rows, weight.exact.shape[-1]), dtype)
                x[-1, 5 : 5 + 9 * len(values) : 9] = values
                check_dot(bench, x, weight, what=f"x with {values}")

    @both_ways
    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:4], ids=str)
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_dot_at_the_end_of_the_range(self, bench: Bench, scheme: Scheme, transposed: bool) -> None:
        """Where the float product is finite so is the result, however near x is to the largest float."""
        weight = exact_codes(scheme, (24, 2 * (scheme.group_size or 80)), "float32")
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 6):
            x = np.zeros((rows, weight.exact.shape[-1]), np.float32)
            x[:, 7] = 3e38
            x[-1, 7] = -1e37
            check_dot(bench, x, weight, what="x of 3e38")

    @both_ways
    @pytest.mark.parametrize("operand", ["x", "packed", "scales", "biases"])
    @pytest.mark.parametrize("form", FORMS)
    def test_dot_memory_forms(self, bench: Bench, form: str, operand: str, transposed: bool) -> None:
        """Strided, read-only and byte-swapped operands give the same as contiguous ones."""
        for scheme in (Scheme(bits=4, group_size=64), Scheme(bits=3, group_size=32)):
            weight = random_weight(scheme, (64, 128), "float32")
            used = weight.mT if transposed else weight
            parts = {
                name: in_form(bench, form, values) if name == operand else bench.array(values)
                for name, values in zip(("packed", "scales", "biases"), weight.leaves, strict=True)
            }
            for rows in (1, 6):
                x = activations("gaussian", (rows, used.exact.shape[-1]), "float32")
                given = in_form(bench, form, x) if operand == "x" else None
                check_dot(bench, x, used, form=given, tensor=bench.annotated(used, **parts), what=f"{operand} {form}")

    @both_ways
    def test_dot_leaves_its_operands_alone(self, bench: Bench, transposed: bool) -> None:
        """Nothing is written to x or to the weight."""
        weight = random_weight(Scheme(bits=4, group_size=64), (64, 128), "float32")
        weight = weight.mT if transposed else weight
        x = activations("gaussian", (3, weight.exact.shape[-1]), "float32")
        before = [part.copy() for part in (x, *weight.leaves)]
        operand, qw = bench.array(x), bench.tensor(weight)
        bench.run("dot", lambda backend: qc.dot(operand, qw, backend=backend), operand, qw, dtype="float32")
        after = (bench.numpy(part) for part in (operand, qw.packed, qw.scales, qw.biases))
        for name, old, new in zip(("x", "packed", "scales", "biases"), before, after, strict=True):
            checks.check_same_bits(new, old, name)

    @pytest.mark.parametrize("rows", [1, 17])
    def test_dot_in_threads(self, bench: Bench, rows: int) -> None:
        """Four threads with their own x on one weight get what one thread gets."""
        weight = random_weight(Scheme(bits=4, group_size=64), (96, 512), "float32")
        qw = bench.tensor(weight)
        inputs = [activations("gaussian", (rows, 512), "float32") * (i + 1) for i in range(4)]
        first = bench.array(inputs[0])
        bench.run("dot", lambda backend: qc.dot(first, qw, backend=backend), first, qw, dtype="float32")
        outputs: list[list[Array]] = [[] for _ in inputs]
        errors: list[Exception] = []

        def work(place: int) -> None:
            try:
                for _ in range(8):
                    x = bench.array(inputs[place])
                    outputs[place].append(bench.numpy(qc.dot(x, qw, backend=bench.backend)).copy())
            except Exception as error:  # shown by the main thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, f"a thread raised {errors[0]!r}"
        for x, results in zip(inputs, outputs, strict=True):
            y = oracle.product(x, weight.exact)
            for result in results:
                error = oracle.nmse(result - y, y, x, weight.exact)
                assert error <= oracle.BOUNDS["default"], f"NMSE {error:.1e} in a thread"


class ContractionTests:
    """``matmul``, ``tensordot`` and quantized left operands: the same kernels, other axes."""

    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:4], ids=str)
    @pytest.mark.parametrize("shape", ["1-D x", "three rows", "batched x", "stack", "stacks that broadcast"])
    @both_ways
    def test_matmul(self, bench: Bench, shape: str, scheme: Scheme, transposed: bool) -> None:
        """``matmul(x, w)`` contracts x's last axis with the weight's axis -2."""
        x_shape, w_shape = SHAPES[shape].of(scheme, transposed)
        weight = random_weight(scheme, w_shape, "float32")
        weight = weight.mT if transposed else weight
        x = activations("gaussian", x_shape, "float32")
        operand, qw = bench.array(x), bench.tensor(weight.mT)
        result = bench.run(
            "matmul", lambda backend: qc.matmul(operand, qw, backend=backend), operand, qw, dtype="float32"
        )
        bench.check_product(result, oracle.product(x, weight.exact), x, weight.exact, "float32", what="matmul")

    @pytest.mark.parametrize("scheme", FEW_SCHEMES[:4], ids=str)
    @pytest.mark.parametrize("shape", ["1-D x", "three rows", "stack", "stacks that broadcast"])
    @both_ways
    def test_matmul_with_the_weight_on_the_left(
        self, bench: Bench, shape: str, scheme: Scheme, transposed: bool
    ) -> None:
        """``matmul(w, x)`` contracts the weight's last axis with x's axis -2."""
        x_shape, w_shape = SHAPES[shape].of(scheme, transposed)
        weight = random_weight(scheme, w_shape, "float32")
        weight = weight.mT if transposed else weight
        x = activations("gaussian", x_shape, "float32")
        right = np.ascontiguousarray(np.swapaxes(x, -1, -2)) if x.ndim > 1 else x
        operand, qw = bench.array(right), bench.tensor(weight)
        result = bench.run(
            "matmul", lambda backend: qc.matmul(qw, operand, backend=backend), qw, operand, dtype="float32"
        )
        y = oracle.product(x, weight.exact)
        turned = bench.swapped(result) if x.ndim > 1 else result
        bench.check_product(turned, y, x, weight.exact, "float32", what="matmul")

    @pytest.mark.parametrize(
        ("x_shape", "w_shape", "axes"),
        [
            ((4, 5, 64), (7, 64), ([2], [1])),
            ((64, 4, 5), (7, 64), ([0], [-1])),
            ((4, 7), (7, 64), 1),
            ((4, 7), (7, 64), ([1], [0])),
            ((4, 64), (3, 7, 64), ([1], [2])),
            ((4, 3, 64), (3, 7, 64), ([1, 2], [0, 2])),
            ((64, 3, 4), (3, 7, 64), ([1, 0], [0, 2])),
            ((4, 7, 2), (3, 7, 64), ([1], [1])),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("left", [False, True], ids=["x·w", "w·x"])
    def test_tensordot(
        self, bench: Bench, x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: Any, left: bool
    ) -> None:
        """Axes named as in the array API: one of the last two, and batch axes summed over."""
        weight = random_weight(Scheme(bits=4, group_size=32), w_shape, "float32")
        x = activations("gaussian", x_shape, "float32")
        operand, qw = bench.array(x), bench.tensor(weight)
        pair = ([len(x_shape) - 1], [0]) if axes == 1 else axes
        if left:
            turned = (pair[1], pair[0])
            result = bench.run(
                "tensordot", lambda backend: qc.tensordot(qw, operand, axes=turned, backend=backend), dtype="float32"
            )
            y = oracle.tensordot(weight.exact, x, turned)
        else:
            result = bench.run(
                "tensordot", lambda backend: qc.tensordot(operand, qw, axes=axes, backend=backend), dtype="float32"
            )
            y = oracle.tensordot(x, weight.exact, axes)
        actual = bench.numpy(result)
        assert actual.shape == y.shape, f"tensordot: shape {actual.shape} instead of {y.shape}"
        error = float(np.square(actual - y).sum() / np.square(y).sum())
        assert error <= oracle.BOUNDS["default"], f"tensordot: NMSE {error:.1e}"
