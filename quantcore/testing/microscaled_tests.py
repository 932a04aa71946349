"""The part of the kit for the microscaled modes: small floats for elements and scales, no biases.

They don't apply to a backend that doesn't declare such a mode.
"""

from typing import Any, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore.scheme import Scheme
from quantcore.testing import checks, oracle
from quantcore.testing.bench import Bench
from quantcore.testing.cases import ACTIVATIONS, DTYPES, MICROSCALED, SHAPES, activations, random_weight, rng
from quantcore.testing.indexing_tests import check_gather_dot, check_take
from quantcore.testing.product_tests import both_ways, check_dot

__all__ = ["MicroscaledTests"]

Array: TypeAlias = np.ndarray[Any, Any]

schemes = pytest.mark.parametrize("scheme", MICROSCALED, ids=str)

_SHAPES = ("1-D x", "many rows", "no row of x", "odd outputs", "ragged", "one element", "stacks that broadcast")


def _groups(scheme: Scheme, dtype: str) -> Array:
    """Rows of one group on which encoders differ: ties, zeros of either sign, the ends of the range, subnormals."""
    group = scheme.group_size or 0
    random = rng("microscaled", str(scheme))
    normal = random.standard_normal((8, group))
    elements = oracle.MICROSCALED[scheme.mode][0]
    finite = np.sort(np.abs(elements[np.isfinite(elements)]))[:: len(elements) // 16]
    top = finite.max()
    ties = np.resize((finite[1:] + finite[:-1]) / 2, group)
    ties[-1] = np.nanmax(elements)
    largest = {"float16": 6e4, "bfloat16": 3.3e38, "float32": 3.4e38}[dtype]
    smallest = 2.0**-24 if dtype == "float16" else 2.0**-149 if dtype == "float32" else 2.0**-133
    if scheme.mode == "nvfp4":
        largest = 2780.0
    rows = [
        normal,
        normal * 10.0 ** random.uniform(-3, 2, (8, 1)),
        [ties, -ties, ties * 4, ties / 2],
        [np.zeros(group), -np.zeros(group), np.full(group, -0.3), np.full(group, top)],
        np.clip(normal[:3] / np.abs(normal[:3]).max(axis=1, keepdims=True), -1, 1) * largest,
        normal[:2] * smallest * 16,
        np.where(random.random((2, group)) < 0.1, normal[:2], 0.0),
    ]
    with np.errstate(over="ignore"):
        return np.concatenate([np.asarray(part) for part in rows]).astype(oracle.numpy_dtype(dtype))


def _quantize(bench: Bench, w: Array, scheme: Scheme, **options: Any) -> None:
    """Quantize on the backend: the oracle's codes and scales, or, with the deviation, a weight within a step."""
    dense = bench.array(w)
    grouped = bench.swapped(dense) if options.get("axis") == -2 else dense
    qw: qc.QuantizedTensor = bench.run(
        "quantize", lambda backend: qc.quantize(dense, scheme, backend=backend, **options), grouped, scheme=scheme
    )
    stored = np.swapaxes(w, -1, -2) if options.get("axis") == -2 else w
    assert qw.shape == w.shape, f"quantize gave a weight of shape {qw.shape} instead of {w.shape}"
    assert qw.biases is None, f"{scheme} has no biases"
    for name, leaf, kind, shape in (
        ("packed", qw.packed, "uint32", scheme.packed_shape(stored.shape)),
        ("scales", qw.scales, "uint8", scheme.scales_shape(stored.shape)),
    ):
        bench.check_kind(leaf, dense, kind, f"quantize ({name})")
        assert tuple(leaf.shape) == shape, f"quantize gave {name} of shape {tuple(leaf.shape)} instead of {shape}"
    packed, scales = bench.numpy(qw.packed), bench.numpy(qw.scales)
    if not bench.deviates("quantize-rounding"):
        wanted = oracle.encode(stored, scheme)
        checks.check_same_bits(scales, wanted[1], f"scales ({scheme})")
        checks.check_same_bits(packed, wanted[0], f"packed codes ({scheme})")
        return
    decoded = oracle.exact_weight(packed, scales, None, scheme, stored.shape[-1])
    size = np.abs(stored.astype(np.float64)).max(axis=-1, keepdims=True)
    assert (np.abs(decoded - stored.astype(np.float64)) <= size / 4).all(), f"{scheme} is off by more than a step"


class MicroscaledTests:
    """mxfp4, mxfp8 and nvfp4 against tables and float64."""

    @schemes
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_microscaled_quantize(self, bench: Bench, dtype: str, scheme: Scheme) -> None:
        """Random, constant, huge, tiny and subnormal groups, and ties: the oracle's codes and scales."""
        bench.require_mode(scheme.mode)
        _quantize(bench, _groups(scheme, dtype), scheme)

    @schemes
    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((0, 64), {}),
            ((5, 71), {"pad": True}),
            ((5, 3), {"pad": True}),
            ((64, 5), {"axis": -2}),
            ((2, 3, 4, 64), {}),
        ],
        ids=str,
    )
    def test_microscaled_quantize_shapes(
        self, bench: Bench, shape: tuple[int, ...], options: dict[str, Any], scheme: Scheme
    ) -> None:
        """No row, a short last group, either axis, stacks."""
        bench.require_mode(scheme.mode)
        _quantize(bench, rng(shape).standard_normal(shape).astype(np.float32), scheme, **options)

    def test_microscaled_quantize_refuses_what_is_not_finite(self, bench: Bench) -> None:
        """NaN and infinities are an error that names the position, though no scale can show them."""
        w = rng("nonfinite").standard_normal((4, 64)).astype(np.float32)
        w[2, 40] = np.nan
        for scheme in MICROSCALED:
            if scheme.mode not in bench.info.modes or bench.refusal("quantize", bench.array(w), scheme=scheme):
                continue
            with pytest.raises(ValueError, match=r"\(2, 40\)"):
                qc.quantize(bench.array(w), scheme, backend=bench.backend)

    @schemes
    @pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
    def test_microscaled_dequantize(self, bench: Bench, dtype: str, scheme: Scheme) -> None:
        """Every code of an element with every scale, bit for bit; where a scale is NaN or too large, not finite."""
        bench.require_mode(scheme.mode)
        codes = np.resize(np.arange(2**scheme.bits), (256, max(2**scheme.bits, 2 * (scheme.group_size or 0))))
        weight = random_weight(scheme, codes.shape, "float32")
        scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], weight.scales.shape).copy()
        qw = bench.annotated(weight, bench.array(oracle.pack_codes(codes, scheme.bits)), bench.array(scales))
        bench.require_dtype(dtype)
        dense = bench.run(
            "dequantize", lambda backend: qc.dequantize(qw, dtype=dtype, backend=backend), qw, dtype=dtype
        )
        packed = oracle.pack_codes(codes, scheme.bits)
        wanted = oracle.dequantize(packed, scales, None, scheme, codes.shape[1], dtype)
        got, finite = bench.numpy(dense), np.isfinite(wanted)
        assert not np.isfinite(got[~finite]).any(), "a NaN, or a product beyond float32's range, became a number"
        zeros = np.zeros_like(wanted)
        checks.check_same_bits(np.where(finite, got, zeros), np.where(finite, wanted, zeros), f"the weight ({scheme})")

    @schemes
    @both_ways
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_microscaled_dot(self, bench: Bench, dtype: str, transposed: bool, scheme: Scheme) -> None:
        """Every dtype that x and the weight share; one row of x, a few, more."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (36, 3 * (scheme.group_size or 0)), dtype)
        weight = weight.mT if transposed else weight
        for rows in (1, 3, 17):
            check_dot(bench, activations("gaussian", (rows, weight.exact.shape[-1]), dtype), weight)

    @schemes
    @both_ways
    @pytest.mark.parametrize("shape", _SHAPES)
    def test_microscaled_dot_shapes(self, bench: Bench, shape: str, transposed: bool, scheme: Scheme) -> None:
        """1-D x, batches, stacks that broadcast, ragged rows, empty and size-1 axes."""
        bench.require_mode(scheme.mode)
        x_shape, w_shape = SHAPES[shape].of(scheme, transposed)
        weight = random_weight(scheme, w_shape, "float32")
        check_dot(bench, activations("gaussian", x_shape, "float32"), weight.mT if transposed else weight, what=shape)

    @schemes
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    @pytest.mark.parametrize("precision", oracle.BOUNDS)
    def test_microscaled_dot_precision(self, bench: Bench, precision: str, kind: str, scheme: Scheme) -> None:
        """Activations of every kind: the error bound of each precision, over short rows and long ones."""
        bench.require_mode(scheme.mode)
        for columns, rows in ((512, (1, 3)), (4096, (1, 17))):
            weight = random_weight(scheme, (40, columns), "float32")
            operand, qw = bench.array(activations(kind, (1, columns), "float32")), bench.tensor(weight)
            if columns > 512 and bench.refusal("dot", operand, qw, precision=precision):
                return
            for count in rows:
                check_dot(bench, activations(kind, (count, columns), "float32"), weight, precision=precision, what=kind)

    @schemes
    @both_ways
    @pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float64"])
    def test_microscaled_dot_of_unequal_dtypes(
        self, bench: Bench, x_dtype: str, transposed: bool, scheme: Scheme
    ) -> None:
        """The result has the dtype of the project's table, and that which is asked for."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (20, 2 * (scheme.group_size or 0)), "float32")
        weight = weight.mT if transposed else weight
        for out_dtype in (None, "float32", "bfloat16"):
            x = activations("gaussian", (3, weight.exact.shape[-1]), x_dtype)
            check_dot(bench, x, weight, out_dtype=out_dtype)

    @schemes
    @both_ways
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_microscaled_dot_of_what_is_not_finite(
        self, bench: Bench, value: float, transposed: bool, scheme: Scheme
    ) -> None:
        """NaN and infinities of x come out where the float product has them, and touch no other row."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (24, 2 * (scheme.group_size or 0)), "float32")
        weight = weight.mT if transposed else weight
        for rows in (1, 6):
            x = activations("gaussian", (rows, weight.exact.shape[-1]), "float32")
            x[-1, 5] = value
            check_dot(bench, x, weight, what=f"x with {value}")

    @schemes
    def test_microscaled_take(self, bench: Bench, scheme: Scheme) -> None:
        """Rows of the dense weight, bit for bit."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (13, 2 * (scheme.group_size or 0)), "float32")
        check_take(bench, weight, np.asarray([[3, 12], [0, -1]]))

    @schemes
    @both_ways
    def test_microscaled_gather_dot(self, bench: Bench, transposed: bool, scheme: Scheme) -> None:
        """Chosen matrices of x with chosen weights of a stack."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (3, 10, 2 * (scheme.group_size or 0)), "float32")
        weight = weight.mT if transposed else weight
        check_gather_dot(bench, (4, 2), weight, np.asarray([3, 0, 1]), np.asarray([2, 2, 0]))

    @schemes
    def test_microscaled_tensors_keep_every_bit(self, bench: Bench, scheme: Scheme) -> None:
        """To the library's arrays and back; pieces and the transpose keep their two arrays."""
        bench.require_mode(scheme.mode)
        weight = random_weight(scheme, (2, 5, 64), "float32")
        back = bench.tensor(weight).mT[1:].mT.to("numpy")
        assert back.biases is None
        checks.check_same_bits(back.packed, weight.packed[1:], "packed")
        checks.check_same_bits(back.scales, weight.scales[1:], "scales")
