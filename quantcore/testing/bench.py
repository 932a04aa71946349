"""The backend under test: its library's arrays, its answers to `supports`, and calls that are checked to be its own."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import numpy as np
import pytest

import quantcore as qc
from quantcore import arrays, registry
from quantcore.dtypes import dtype_name
from quantcore.testing import checks, oracle
from quantcore.testing.cases import Weight
from quantcore.testing.report import Entry, Outcome

__all__ = ["Bench"]

Array: TypeAlias = np.ndarray[Any, Any]

_EXPLAINED = ("quantize", "dequantize", "dot", "matmul", "take", "gather_dot", "prepack")
_HOOK_OF = {"matmul": "dot", "tensordot": "dot"}


class Bench:
    """One backend on one library's arrays.

    Parameters
    ----------
    backend : str
    library : str
        Name of the array library, for :func:`quantcore.to_library`.
    note : callable
        Takes each :class:`Entry`.

    Raises
    ------
    BackendNotFoundError, BackendUnavailableError
        If the backend isn't READY.
    """

    def __init__(self, backend: str, library: str, note: Callable[[Entry], None]) -> None:
        self.backend = backend
        self.library = library
        self.info = registry.find(backend).info
        self._note = note
        sample = qc.to_library(np.zeros(1, np.float32), library)
        self.device = arrays.device_of(sample)
        self._array_type = type(sample)
        self._namespace = arrays.plain_namespace(sample)

    # --- arrays -----------------------------------------------------------------------------------------------

    def array(self, values: Array) -> Any:
        """The library's array with these elements; skips where the library has no such dtype."""
        name = dtype_name(values.dtype)
        own = values.copy()  # a backend that writes to its operands must not move the goal
        try:
            return qc.to_library(own, self.library)
        except qc.UnsupportedError as error:
            self.inapplicable(str(error))
        except Exception:
            if name == "float32" or hasattr(self._namespace, name):
                raise
            self.inapplicable(f"{self.library} has no {name}")

    def tensor(self, weight: Weight) -> qc.QuantizedTensor:
        """The weight in the library's arrays."""
        return self.annotated(weight, *map(self.array, weight.leaves))

    def annotated(self, weight: Weight, packed: Any, scales: Any, biases: Any = None) -> qc.QuantizedTensor:
        """The weight with these arrays of the library for leaves."""
        self.require_dtype(weight.dtype)
        shape, scheme = weight.stored_shape, weight.scheme
        qw = qc.quantized_tensor(packed, scales, biases, shape, scheme, dtype=weight.dtype)
        return qw.mT if weight.transposed else qw

    def require_dtype(self, name: str) -> None:
        """Skip where the library has no such dtype."""
        self.array(np.zeros(1, oracle.numpy_dtype(name)))

    def require_mode(self, mode: str) -> None:
        """Skip where the backend doesn't declare the mode."""
        if mode not in self.info.modes:
            self.inapplicable(f"{self.backend} declares no {mode}")

    def swapped(self, array: Any) -> Any:
        """The library's array with its last two axes swapped."""
        return self._namespace.matrix_transpose(array)

    def numpy(self, array: Any) -> Array:
        """NumPy's array with the elements of the library's."""
        return np.asarray(qc.to_library(array, "numpy"))

    # --- calls ------------------------------------------------------------------------------------------------

    def run(
        self,
        op: str,
        call: Callable[[str], Any],
        *asked: Any,
        dtype: str | None = None,
        scheme: qc.Scheme | None = None,
        precision: str | None = None,
    ) -> Any:
        """Make a call on the backend; skips where `supports` refuses, and then checks that the call raises.

        Parameters
        ----------
        op : str
        call : callable
            Takes the backend's name.
        *asked : array or QuantizedTensor
            The operands, as for :func:`quantcore.explain`.
        dtype : str, optional
            Of the result, where that is one array.
        scheme, precision : optional
            As for :func:`quantcore.explain`.
        """
        refusal = self.refusal(op, *asked, scheme=scheme, precision=precision) if op in _EXPLAINED else None
        try:
            result = call(self.backend)
        except qc.UnsupportedError as error:
            if refusal == "":
                raise AssertionError(f"{op} raises UnsupportedError where supports says True: {error}") from error
            self.refused(op, refusal or str(error))
        if refusal:
            raise AssertionError(f"{op} ran although the backend refuses it: {refusal}")
        self._note(self._entry(op, "ran"))
        if dtype is not None:
            self.check_kind(result, asked[0] if asked else None, dtype, op)
        return result

    def refusal(self, op: str, *asked: Any, scheme: qc.Scheme | None = None, precision: str | None = None) -> str:
        """Why the backend refuses a call; empty where it computes it."""
        told = qc.explain(op, *asked, scheme=scheme, precision=precision, backend=self.backend)
        if told.backend == self.backend:
            return ""
        if told.backend is not None or len(told.verdicts) != 1 or told.verdicts[0].backend != self.backend:
            raise AssertionError(f"{self.backend} wasn't asked: {told}")
        reason = told.verdicts[0].reason
        if "supports() raised" in reason or "is UNAVAILABLE" in reason:
            raise AssertionError(f"{self.backend}: {reason}")
        if reason == "refuses, giving no reason":
            raise AssertionError(f"supports({op!r}, ...) must return True or the reason why not")
        if reason == f"has no {op}" and op not in ("take", "gather_dot", "prepack"):
            raise AssertionError(f"{self.backend} {reason}")
        return reason

    def refused(self, op: str, reason: str) -> NoReturn:
        """Skip: the backend's `supports` refuses the call."""
        self._note(self._entry(op, "refused", reason))
        pytest.skip(f"{self.backend} refuses {op}: {reason}")

    def inapplicable(self, reason: str) -> NoReturn:
        """Skip: the library can't express the case."""
        self._note(self._entry("", "inapplicable", reason))
        pytest.skip(reason)

    def _entry(self, op: str, outcome: Outcome, reason: str = "") -> Entry:
        return Entry(self.backend, self.library, _HOOK_OF.get(op, op), outcome, reason)

    # --- results ----------------------------------------------------------------------------------------------

    def check_kind(self, result: Any, like: Any, dtype: str, what: str) -> None:
        """`result` is the library's own array, of that dtype, in native byte order, on the device of `like`."""
        assert type(result) is self._array_type, (
            f"{what} gave a {type(result).__module__}.{type(result).__qualname__}, not {self.library}'s own array type"
        )
        assert dtype_name(result.dtype) == dtype, f"{what} gave {dtype_name(result.dtype)} instead of {dtype}"
        assert getattr(result.dtype, "isnative", True), f"{what} gave an array in swapped byte order"
        if like is None:
            return
        of_result, of_like = (arrays.device_of(a) for a in (result, getattr(like, "packed", like)))
        assert of_result == of_like, f"{what} gave an array on {of_result}; its operand is on {of_like}"

    def check_product(
        self,
        result: Any,
        y: Array,
        x: Array,
        w: Array,
        dtype: str,
        precision: str = "default",
        half: str | None = None,
        what: str = "dot",
    ) -> None:
        """The product keeps to the bound of its precision, and is non-finite where it must be.

        Parameters
        ----------
        result : array of the library, shape (..., M, N) or (..., N)
        y : array of the same shape, float64
        x : array, shape (..., M, K) or (K,)
        w : array, shape (..., N, K), float64
        dtype : str
            Of the result.
        precision : str
        half : str, optional
            Half-precision dtype of x or of the weight, where either has one.
        what : str
        """
        actual = self.numpy(result)
        assert actual.shape == y.shape, f"{what}: shape {actual.shape} instead of {y.shape}"
        measured = checks.check_nonfinite(actual, y, dtype, self.deviates("nonfinite-as-nan"), what)
        error = checks.product_error(actual, y, x, w, dtype, measured, self.deviates("flush-subnormals"))
        bound = oracle.BOUNDS[precision]
        if half is not None and self.deviates("half-weight"):
            bound += checks.HALF_ROUNDOFF[half] ** 2
        else:
            self._note(Entry(self.backend, self.library, what, "measured", precision=precision, error=error))
        assert error <= bound, f"{what}: NMSE of the worst row is {error:.2e}, over the bound {bound:.0e} ({precision})"

    def deviates(self, name: str) -> bool:
        """Whether the backend declares the deviation on the device of its library's arrays."""
        return self.info.deviates(name, self.device)
