"""NumPy: the CPU fallback, complete and always installed."""

from typing import Any

import numpy as np

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl
from quantcore.dtypes import numpy_dtype
from quantcore.scheme import MODES
from quantcore_backends import cpu_kernels

__all__ = ["NumPyBackend", "backend"]

Array = np.ndarray[Any, Any]


class NumPyBackend:
    """The CPU kernels as a backend for ``numpy.ndarray``; with Numba, compiled."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="numpy",
            library="numpy",
            array_types=("numpy:ndarray",),
            priority=0,
            marks_nonfinite=True,
            modes=MODES,
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything in the canonical layout."""
        return True if call.layout == "row" else f"knows the layout 'row' only, not {call.layout!r}"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        """Encode along the last axis."""
        return cpu_kernels.encode(w, scheme)

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """Decode the whole weight."""
        return _decode(qw, qw.flatten()[0], dtype)

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """See :func:`quantcore_backends.cpu_kernels.dot`."""
        return cpu_kernels.dot(x, qw, numpy_dtype(dtype), precision)

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """Gather packed slices, then decode those."""
        return _decode(qw, tuple(np.take(leaf, indices, axis=axis) for leaf in qw.flatten()[0]), dtype)

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """Products grouped by weight, so that each is unpacked once."""
        return cpu_kernels.gather_dot(x, qw, lhs_indices, rhs_indices, numpy_dtype(dtype), precision)

    @hookimpl
    def from_numpy(self, array: Array, device: Any) -> Array:
        """The array itself."""
        if device not in (None, "cpu"):
            raise ValueError(f"numpy arrays live on the cpu, not on {device!r}")
        return array

    @hookimpl
    def to_numpy(self, array: Array) -> Array:
        """The array itself."""
        return array


def _decode(qw: QuantizedTensor, leaves: tuple[Array, ...], dtype: str) -> Array:
    return cpu_kernels.decode(leaves, qw.scheme, qw.in_features, numpy_dtype(dtype))


backend = NumPyBackend()
