"""The part of the kit for quantize and dequantize: bit for bit what the oracle gives, or a declared deviation."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore.scheme import Scheme
from quantcore.testing import checks, oracle
from quantcore.testing.bench import Bench
from quantcore.testing.cases import DTYPES, FEW_SCHEMES, SCHEMES, Weight, groups_to_encode, random_weight, rng
from quantcore.testing.forms import FORMS, in_form

__all__ = ["DequantizeTests", "QuantizeTests", "check_decoded"]

Array: TypeAlias = np.ndarray[Any, Any]

_PART = {
    "several rows": (5, 2, 0, -1),
    "one row": (1, 2, 0, -1),
    "no row": (0, 2, 0, -1),
    "one group": (5, 1, 0, -1),
    "hundreds of rows": (301, 1, 0, -1),
    "short last group": (5, 2, 5, -1),
    "short last group of one": (5, 1, 1, -1),
    "shorter than a group": (5, 0, 7, -1),
    "along axis -2": (5, 2, 0, -2),
    "short last group along axis -2": (5, 1, 3, -2),
}
"""Rows, whole groups, elements beyond them, axis."""


def _quantize(bench: Bench, w: Array, scheme: Scheme, form: Any = None, **options: Any) -> qc.QuantizedTensor:
    """Quantize on the backend, and check the kind and shape of what it gives."""
    dense = bench.array(w) if form is None else form
    grouped = bench.swapped(dense) if options.get("axis") == -2 else dense
    if w.dtype == np.float64:
        grouped = bench.array(w.astype(np.float32))
    dtype = "float32" if w.dtype == np.float64 else w.dtype.name
    qw: qc.QuantizedTensor = bench.run(
        "quantize",
        lambda backend: qc.quantize(dense, scheme, backend=backend, **options),
        grouped,
        scheme=scheme,
    )
    assert qw.shape == w.shape, f"quantize gave a weight of shape {qw.shape} instead of {w.shape}"
    assert qw.dtype_name == dtype, f"quantize gave a weight of dtype {qw.dtype_name} instead of {dtype}"
    stored = np.swapaxes(w, -1, -2).shape if options.get("axis") == -2 else w.shape
    for name, leaf, kind, shape in (
        ("packed", qw.packed, "uint32", scheme.packed_shape(stored)),
        ("scales", qw.scales, dtype, scheme.scales_shape(stored)),
        ("biases", qw.biases, dtype, scheme.scales_shape(stored)),
    ):
        bench.check_kind(leaf, dense, kind, f"quantize ({name})")
        assert tuple(leaf.shape) == shape, f"quantize gave {name} of shape {tuple(leaf.shape)} instead of {shape}"
    return qw


def _check_encoded(bench: Bench, qw: qc.QuantizedTensor, w: Array, scheme: Scheme, what: str) -> None:
    """Codes, scales and biases are the oracle's, bit for bit; with the deviation, the weight is within a step."""
    got = [bench.numpy(leaf) for leaf in (qw.packed, qw.scales, qw.biases)]
    if bench.deviates("quantize-rounding"):
        _check_within_a_step(got, w.astype(np.float64), scheme, what)
        return
    wanted = oracle.encode(w, scheme)
    for name, actual, expected in zip(("packed codes", "scales", "biases"), got, wanted, strict=True):
        assert expected is not None
        checks.check_same_bits(actual, expected, f"{name} of {what}")


def _check_within_a_step(got: list[Array], w: Array, scheme: Scheme, what: str) -> None:
    """Whatever its rounding, an encoder keeps to a step over a range that has zero in it."""
    packed, scales, biases = got
    columns = w.shape[-1]
    group = scheme.group_size or columns
    top = 2**scheme.bits - 1
    decoded = oracle.exact_weight(packed, scales, biases, scheme, columns)
    stored = top * oracle.half_ulp(scales, scales.dtype.name) + oracle.half_ulp(biases, biases.dtype.name)
    for place, start in enumerate(range(0, columns, group)):
        here = w[..., start : start + group]
        span = np.maximum(here.max(-1), 0) - np.minimum(here.min(-1), 0)
        allowed = 1.1 * np.maximum(span / top, 1e-7) + stored[..., place]
        error = np.abs(decoded[..., start : start + group] - here).max(-1)
        assert (error <= allowed).all(), f"{what} is off by more than a step, in the group from column {start}"


class QuantizeTests:
    """Encoding against the rules of plugins.md."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_quantize_matches_the_reference(self, bench: Bench, scheme: Scheme, dtype: str) -> None:
        """Random, constant, huge, tiny and subnormal groups, and ties: the same codes, scales and biases."""
        kinds = groups_to_encode(scheme.bits, scheme.group_size or 80, dtype)
        w = np.concatenate(list(kinds.values()))
        qw = _quantize(bench, w, scheme)
        start = 0
        for name, rows in kinds.items():
            part = qw[start : start + len(rows)]
            start += len(rows)
            _check_encoded(bench, part, rows, scheme, f"{name} groups ({scheme}, {dtype})")

    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    @pytest.mark.parametrize("part", _PART)
    def test_quantize_shapes(self, bench: Bench, part: str, scheme: Scheme) -> None:
        """Few rows and many, several groups a row, a short last group, either axis."""
        rows, groups, extra, axis = _PART[part]
        group = scheme.group_size or 80
        w = rng(part).standard_normal((rows, groups * group + extra)).astype(np.float32)
        dense = np.ascontiguousarray(w.T) if axis == -2 else w
        qw = _quantize(bench, dense, scheme, axis=axis, pad=extra > 0)
        _check_encoded(bench, qw, w, scheme, part)

    @pytest.mark.parametrize("leading", [(3,), (2, 3), (0,), (1, 1)], ids=str)
    def test_quantize_stacks(self, bench: Bench, leading: tuple[int, ...]) -> None:
        """Leading axes are batch axes."""
        scheme = Scheme(bits=3, group_size=32)
        w = rng(leading).standard_normal((*leading, 4, 64)).astype(np.float32)
        _check_encoded(bench, _quantize(bench, w, scheme), w, scheme, f"a stack {leading}")

    def test_quantize_takes_float64_as_float32(self, bench: Bench) -> None:
        """A float64 weight is encoded from its float32 value."""
        scheme = Scheme(bits=4, group_size=32)
        w = rng("float64").standard_normal((4, 64))
        _check_encoded(bench, _quantize(bench, w, scheme), w.astype(np.float32), scheme, "a float64 weight")

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("form", FORMS)
    def test_quantize_memory_forms(self, bench: Bench, form: str, dtype: str) -> None:
        """Strided, read-only and byte-swapped weights give the same as contiguous ones."""
        scheme = Scheme(bits=4, group_size=32)
        w = rng("form").standard_normal((6, 64)).astype(dtype)
        _check_encoded(bench, _quantize(bench, w, scheme, form=in_form(bench, form, w)), w, scheme, form)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
    def test_quantize_refuses_what_is_not_finite(self, bench: Bench, value: float) -> None:
        """NaN and infinities are an error that names the position, or are replaced on request."""
        scheme = Scheme(bits=4, group_size=32)
        w = rng("nonfinite").standard_normal((4, 64)).astype(np.float32)
        _quantize(bench, w, scheme)
        clipped = w.copy()
        w[2, 40] = value
        with pytest.raises(ValueError, match=r"\(2, 40\)"):
            qc.quantize(bench.array(w), scheme, backend=bench.backend)
        largest = np.abs(np.delete(w[2, 32:], 8)).max()
        clipped[2, 40] = 0 if np.isnan(value) else np.copysign(largest, value)
        qw = qc.quantize(bench.array(w), scheme, backend=bench.backend, nonfinite="clip")
        _check_encoded(bench, qw, clipped, scheme, "a clipped weight")


def _dequantize(
    bench: Bench,
    scheme: Scheme,
    shape: tuple[int, ...],
    dtype: str,
    leaf_dtype: str,
    out_dtype: str | None = None,
    transposed: bool = False,
) -> None:
    weight = random_weight(scheme, shape, dtype, leaf_dtype)
    weight = weight.mT if transposed else weight
    qw = bench.tensor(weight)
    wanted = out_dtype or dtype
    bench.require_dtype(wanted)
    dense = bench.run(
        "dequantize", lambda backend: qc.dequantize(qw, dtype=out_dtype, backend=backend), qw, dtype=wanted
    )
    check_decoded(bench, dense, weight, wanted, f"the weight ({scheme}, {dtype})")


def _dequantized(qw: qc.QuantizedTensor, backend: str) -> Any:
    return qc.dequantize(qw, backend=backend)


class DequantizeTests:
    """Decoding against the rules of plugins.md."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_dequantize_matches_the_rule(self, bench: Bench, scheme: Scheme, dtype: str) -> None:
        """``code * scale + bias`` in float32, rounded once: random codes, every scheme and dtype."""
        _dequantize(bench, scheme, (13, 2 * (scheme.group_size or 80)), dtype, dtype)

    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    @pytest.mark.parametrize("part", [name for name in _PART if "axis" not in name])
    def test_dequantize_shapes(self, bench: Bench, part: str, scheme: Scheme) -> None:
        """Few rows and many, a short last group, both orientations."""
        rows, groups, extra, _ = _PART[part]
        shape = (rows, groups * (scheme.group_size or 80) + extra)
        _dequantize(bench, scheme, shape, "float32", "float32")
        _dequantize(bench, scheme, shape, "float32", "float32", transposed=True)

    @pytest.mark.parametrize("leading", [(3,), (2, 3), (0,), (1, 1)], ids=str)
    def test_dequantize_stacks(self, bench: Bench, leading: tuple[int, ...]) -> None:
        """Leading axes are batch axes."""
        _dequantize(bench, Scheme(bits=5, group_size=32), (*leading, 4, 64), "float32", "float32")

    @pytest.mark.parametrize("out_dtype", [*DTYPES, "float64"])
    @pytest.mark.parametrize("leaf_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dequantize_dtypes(self, bench: Bench, dtype: str, leaf_dtype: str, out_dtype: str) -> None:
        """The dtype of scales, the logical dtype and the dtype asked for are independent of one another."""
        _dequantize(bench, Scheme(bits=8, group_size=32), (5, 64), dtype, leaf_dtype, out_dtype)

    @pytest.mark.parametrize("leaf", ["packed", "scales", "biases"])
    @pytest.mark.parametrize("form", FORMS)
    def test_dequantize_memory_forms(self, bench: Bench, form: str, leaf: str) -> None:
        """Strided, read-only and byte-swapped leaves give the same as contiguous ones."""
        for scheme in (Scheme(bits=3, group_size=32), Scheme(bits=8, group_size=None)):
            weight = random_weight(scheme, (6, 64), "float32")
            parts = {
                name: in_form(bench, form, values) if name == leaf else bench.array(values)
                for name, values in zip(("packed", "scales", "biases"), weight.leaves, strict=True)
            }
            qw = bench.annotated(weight, **parts)
            dense = bench.run("dequantize", partial(_dequantized, qw), qw, dtype="float32")
            check_decoded(bench, dense, weight, "float32", f"{leaf} {form}")


def check_decoded(
    bench: Bench,
    dense: Any,
    weight: Weight,
    dtype: str,
    what: str,
    part: Callable[[Array], Array] = lambda whole: whole,
) -> None:
    """Bit for bit the rule's result, or one that a declared deviation allows.

    Parameters
    ----------
    bench : Bench
    dense : array of the library
    weight : Weight
    dtype : str
        Of the result.
    what : str
    part : callable
        Gives the part of the whole weight that `dense` is.
    """
    kind = oracle.numpy_dtype(dtype)
    allowed = [weight.dense(dtype)]
    if bench.deviates("dequantize-fma"):
        allowed.append(weight.exact.astype(np.float32).astype(kind))
    if bench.deviates("dequantize-double-rounding") and weight.biases is not None:
        allowed.append(_rounded_twice(weight, kind))
    checks.check_one_of(bench.numpy(dense), tuple(map(part, allowed)), what)


def _rounded_twice(weight: Weight, kind: np.dtype[Any]) -> Array:
    assert weight.biases is not None
    codes = oracle.decode_codes(weight.packed, weight.scheme.bits, weight.columns)
    group = np.arange(weight.columns) // (weight.scheme.group_size or weight.columns)
    scaled = codes.astype(kind) * weight.scales.astype(kind)[..., group]
    dense = scaled.astype(kind) + weight.biases.astype(kind)[..., group]
    return np.swapaxes(dense, -1, -2) if weight.transposed else dense
