"""The part of the kit for everything but numbers: dispatch, transfer, layouts of a backend's own, errors."""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore import registry
from quantcore.scheme import Scheme
from quantcore.testing import checks, oracle
from quantcore.testing.bench import Bench
from quantcore.testing.cases import DTYPES, FEW_SCHEMES, SCHEMES, activations, random_weight, rng

__all__ = ["DispatchTests", "ErrorTests", "LayoutTests", "TransferTests"]

Array: TypeAlias = np.ndarray[Any, Any]

_SCHEME = Scheme(bits=4, group_size=64)


class _Call:
    """A call of an op on small operands: what `explain` is asked, and how it is made."""

    def __init__(self, bench: Bench, op: str, scheme: Scheme = _SCHEME) -> None:
        group = scheme.group_size or 80
        weight = random_weight(scheme, (3, 12, group) if op == "gather_dot" else (12, group), "float32")
        self.op = op
        self.scheme = scheme if op == "quantize" else None
        qw = bench.tensor(weight)
        x = bench.array(activations("gaussian", (3, 2, group) if op == "gather_dot" else (2, group), "float32"))
        index = bench.array(np.asarray([1, 0]))
        dense = bench.array(rng(op).standard_normal((12, group)).astype(np.float32))
        self.asked: tuple[Any, ...]
        self.make: Callable[[str | None], Any]
        if op == "quantize":
            self.asked = (dense,)
            self.make = lambda backend: qc.quantize(dense, scheme, backend=backend).packed
        elif op == "dequantize":
            self.asked = (qw,)
            self.make = lambda backend: qc.dequantize(qw, backend=backend)
        elif op == "take":
            self.asked = (qw,)
            self.make = lambda backend: qc.take(qw, index, backend=backend)
        elif op == "gather_dot":
            self.asked = (x, qw)
            self.make = lambda backend: qc.gather_dot(x, qw, index, index, backend=backend)
        else:
            self.asked = (x, qw)
            self.make = lambda backend: qc.dot(x, qw, backend=backend)

    def explained(self, **options: Any) -> qc.Explanation:
        """What `explain` says."""
        return qc.explain(self.op, *self.asked, scheme=self.scheme, **options)


@contextmanager
def _functions_called() -> Iterator[set[types.CodeType] | None]:
    """The code of every Python function that this thread enters; None where a profiler is watching already."""
    if sys.getprofile() is not None:
        yield None
        return
    seen: set[types.CodeType] = set()

    def note(frame: types.FrameType, event: str, _arg: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _entered(code: types.CodeType | None, called: set[types.CodeType] | None) -> bool:
    return code is None or called is None or code in called


def _code_of(backend: str, op: str) -> types.CodeType | None:
    """The code of a backend's hook; None where it isn't a Python function."""
    hook = getattr(registry.find(backend).plugin, op, None)
    function = getattr(hook, "__func__", hook)
    code = getattr(function, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _within(bench: Bench, call: _Call) -> Any:
    with qc.use_backend(bench.backend):
        return call.make(None)


class DispatchTests:
    """The named backend is the one that runs."""

    @pytest.mark.parametrize("op", ["quantize", "dequantize", "dot", "take", "gather_dot"])
    def test_the_named_backend_runs(self, bench: Bench, op: str) -> None:
        """Its own hook is entered, by `backend=` and within `use_backend`, and `explain` said so."""
        call = _Call(bench, op)
        bench.run(op, call.make, *call.asked, scheme=call.scheme)
        code = _code_of(bench.backend, op)
        for make in (partial(call.make, bench.backend), partial(_within, bench, call)):
            with _functions_called() as called:
                make()
            assert _entered(code, called), f"{op}: {bench.backend!r} was named, but its hook didn't run"
        with qc.use_backend(bench.backend):
            assert call.explained().backend == bench.backend

    @pytest.mark.parametrize("op", ["quantize", "dequantize", "dot", "take", "gather_dot"])
    @pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
    def test_without_a_name_the_explained_backend_runs(self, bench: Bench, op: str) -> None:
        """Left to the annotation, the choice is the one that `explain` tells, and this backend is among those asked."""
        call = _Call(bench, op)
        refusal = bench.refusal(op, *call.asked, scheme=call.scheme)
        told = call.explained()
        if told.backend is None:
            bench.refused(op, refusal)
        asked = [verdict.backend for verdict in told.verdicts]
        assert bench.backend in asked, f"{op}: {bench.backend} isn't asked for {bench.library} arrays: {told}"
        code = _code_of(told.backend, op)
        with _functions_called() as called:
            call.make(None)
        assert _entered(code, called), f"{op}: explain said {told.backend!r}, but its hook didn't run"

    @pytest.mark.parametrize("op", ["quantize", "dequantize", "dot"])
    def test_something_is_supported(self, bench: Bench, op: str) -> None:
        """A backend that refuses every scheme of a required op isn't tested by skipping everything."""
        reasons = set()
        for scheme in SCHEMES:
            call = _Call(bench, op, scheme)
            reason = bench.refusal(op, *call.asked, scheme=call.scheme)
            if not reason:
                return
            reasons.add(reason)
        raise AssertionError(f"{bench.backend} refuses {op} for every scheme: {'; '.join(sorted(reasons))}")


class TransferTests:
    """To the library's arrays and back."""

    @pytest.mark.parametrize("shape", [(4, 6), (3,), (0, 5), (2, 1, 3), ()], ids=str)
    @pytest.mark.parametrize("dtype", [*DTYPES, "float64", "uint32", "int32", "int64", "uint8"])
    def test_arrays_keep_every_bit(self, bench: Bench, dtype: str, shape: tuple[int, ...]) -> None:
        """`to_library` there and back changes nothing."""
        if dtype in ("uint32", "int32", "int64", "uint8"):
            kind = np.dtype(dtype)
            values = rng(shape).integers(np.iinfo(kind).min, np.iinfo(kind).max, shape, kind, endpoint=True)
        else:
            kind = oracle.numpy_dtype(dtype)
            values = np.asarray(rng(shape).standard_normal(shape)).astype(kind)
        values = np.asarray(values)
        array = bench.array(values)
        bench.check_kind(array, None, dtype, "to_library")
        checks.check_same_bits(bench.numpy(array), values, f"{dtype} there and back")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_keep_every_bit(self, bench: Bench, dtype: str) -> None:
        """`QuantizedTensor.to` there and back changes nothing."""
        weight = random_weight(_SCHEME, (5, 128), dtype)
        local = qc.quantized_tensor(weight.packed, weight.scales, weight.biases, weight.stored_shape, weight.scheme)
        bench.require_dtype(dtype)
        moved = local.to(bench.library)
        assert moved.library == bench.library
        back = moved.to("numpy")
        for name in ("packed", "scales", "biases"):
            checks.check_same_bits(getattr(back, name), getattr(local, name), name)


class LayoutTests:
    """Layouts of a backend's own."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=str)
    @pytest.mark.parametrize("leading", [(), (2,)], ids=["2-D", "3-D"])
    def test_prepack(self, bench: Bench, leading: tuple[int, ...], scheme: Scheme, dtype: str) -> None:
        """A prepacked weight multiplies and decodes like the canonical one, and goes back to it bit for bit."""
        weight = random_weight(scheme, (*leading, 19, 2 * (scheme.group_size or 80)), dtype)
        qw = bench.tensor(weight)
        reason = bench.refusal("prepack", qw)
        if reason:
            bench.refused("prepack", reason)
        packed = bench.run("prepack", lambda backend: qc.prepack(qw, backend=backend), qw)
        assert packed.layout != "row", f"prepack gave the canonical layout; refuse {scheme} in supports instead"
        assert packed.shape == qw.shape
        assert packed.dtype_name == qw.dtype_name
        restored = packed.canonical()
        assert restored.layout == "row"
        for name, expected in zip(("packed", "scales", "biases"), weight.leaves, strict=True):
            checks.check_same_bits(bench.numpy(getattr(restored, name)), expected, f"{name} after canonical()")
        some = packed[..., 3:7, :].canonical()
        for name, expected in zip(("packed", "scales", "biases"), weight.leaves, strict=True):
            checks.check_same_bits(bench.numpy(getattr(some, name)), expected[..., 3:7, :], f"{name} of some rows")
            checks.check_same_bits(bench.numpy(getattr(qw, name)), expected, f"{name} of the weight that was prepacked")
        for rows in (1, 5):
            x = activations("gaussian", (rows, weight.exact.shape[-1]), dtype)
            operand = bench.array(x)
            y = oracle.product(x, weight.exact)
            if bench.refusal("dot", operand, packed):
                continue  # prepacked for another op
            result = qc.dot(operand, packed, backend=bench.backend)
            half = dtype if dtype in checks.HALF_ROUNDOFF else None
            bench.check_product(result, y, x, weight.exact, dtype, half=half, what="dot of a prepacked weight")


class ErrorTests:
    """What is wrong raises the documented error, and crashes nothing."""

    @pytest.mark.parametrize(("x_shape", "message"), [((3, 63), "63"), ((65,), "65"), ((), "0-d|no axis")], ids=str)
    def test_a_shape_that_does_not_fit(self, bench: Bench, x_shape: tuple[int, ...], message: str) -> None:
        """ValueError with the lengths."""
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        x = bench.array(np.ones(x_shape, np.float32))
        with pytest.raises(ValueError, match=message):
            qc.dot(x, qw, backend=bench.backend)

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
    def test_an_x_that_is_not_floating(self, bench: Bench, dtype: str) -> None:
        """TypeError with the dtype."""
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        x = bench.array(np.ones((2, 64), dtype))
        with pytest.raises(TypeError, match=dtype):
            qc.dot(x, qw, backend=bench.backend)

    def test_an_x_of_another_library(self, bench: Bench) -> None:
        """TypeError that shows the conversion."""
        if bench.library == "numpy":
            bench.inapplicable("NumPy's arrays are the other library's")
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        with pytest.raises(TypeError, match=r"to\('numpy'\)"):
            qc.dot(np.ones((2, 64), np.float32), qw, backend=bench.backend)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"precision": "exact"}, ValueError, "exact"),
            ({"out_dtype": "int32"}, TypeError, "int32"),
            ({"backend": "no such backend"}, qc.BackendNotFoundError, "no such backend"),
        ],
        ids=["precision", "out_dtype", "backend"],
    )
    def test_an_unknown_option(
        self, bench: Bench, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        """The value is named."""
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        x = bench.array(np.ones((2, 64), np.float32))
        with pytest.raises(error, match=message):
            qc.dot(x, qw, **{"backend": bench.backend, **options})

    def test_an_unknown_dtype_to_dequantize_to(self, bench: Bench) -> None:
        """TypeError with the dtype."""
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        with pytest.raises(TypeError, match="int8"):
            qc.dequantize(qw, dtype="int8", backend=bench.backend)

    def test_a_group_that_does_not_divide(self, bench: Bench) -> None:
        """ValueError that names pad=True."""
        w = bench.array(np.ones((4, 65), np.float32))
        with pytest.raises(ValueError, match="pad=True"):
            qc.quantize(w, _SCHEME, backend=bench.backend)

    def test_indices_that_are_not_integers(self, bench: Bench) -> None:
        """TypeError with the dtype."""
        qw = bench.tensor(random_weight(_SCHEME, (5, 64), "float32"))
        with pytest.raises(TypeError, match="float32"):
            qc.take(qw, bench.array(np.ones(2, np.float32)), backend=bench.backend)

    def test_stacks_that_do_not_broadcast(self, bench: Bench) -> None:
        """ValueError with both shapes."""
        qw = bench.tensor(random_weight(_SCHEME, (3, 5, 64), "float32"))
        x = bench.array(np.ones((2, 4, 64), np.float32))
        with pytest.raises(ValueError, match="broadcast"):
            qc.dot(x, qw, backend=bench.backend)
