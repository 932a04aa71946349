"""PyTorch: registered operators that trace, compile and differentiate; our CPU kernels below them, tiles elsewhere."""

from typing import Any

import numpy as np

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl

__all__ = ["TorchBackend", "backend"]

Array = Any


class TorchBackend:
    """The operators of :mod:`~quantcore_backends.torch_backend.ops` as a backend for ``torch.Tensor``."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="torch",
            library="torch",
            array_types=("torch:Tensor",),
            requires=("torch",),
            install_hint='pip install "quantcore-arrays[torch]"',
            priority=10,
        )

    @hookimpl
    def prepare(self) -> None:
        """Register the operators, QuantizedTensor as a pytree, and what ``torch.compile`` shall not look into."""
        from quantcore_backends.torch_backend import gradients, ops, pickling, tracing

        self._ops, self._products = ops.OPERATORS, gradients
        tracing.register()
        pickling.register()

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything in the canonical layout."""
        wide = "float64" in (call.x_dtype, call.out_dtype) or call.precision == "highest"
        if wide and op in ("dot", "gather_dot") and (call.device or "").startswith("mps"):
            return "needs float64, which MPS lacks"
        return True if call.layout == "row" else f"knows the layout 'row' only, not {call.layout!r}"

    @hookimpl
    def describe(self, op: str, call: Call) -> str:
        """The CPU kernels, or tiles of the weight on other devices, with the reason of the slower path."""
        from quantcore_backends.cpu_kernels import compiled

        if call.device not in (None, "cpu"):
            return (
                f"plain torch operations, a tile of the weight at a time: our kernels are for CPUs, not {call.device}"
            )
        if not compiled.available():
            return (
                "our CPU kernels in NumPy alone, more slowly: Numba is not there, or QUANTCORE_COMPILED is 0; "
                'pip install "quantcore-arrays[fast]"'
            )
        return "our compiled CPU kernels"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        """``quantcore::quantize``."""
        packed, scales, biases = self._ops.quantize(w, str(scheme))
        return packed, scales, biases

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """``quantcore::dequantize``."""
        return self._ops.dequantize(qw.packed, qw.scales, qw.biases, str(qw.scheme), qw.in_features, dtype)

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """``quantcore::dot``."""
        note = qw.annotation
        weight = (qw.packed, qw.scales, qw.biases, str(note.scheme), qw.in_features, note.transposed)
        return self._products.dot(x, *weight, dtype, precision)

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """``quantcore::take``: IndexError for an index out of range on the CPU, NaN elsewhere."""
        return self._ops.take(qw.packed, qw.scales, qw.biases, indices, str(qw.scheme), qw.in_features, axis, dtype)

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """``quantcore::gather_dot``: IndexError for an index out of range on the CPU, NaN elsewhere."""
        weight = (qw.packed, qw.scales, qw.biases, lhs_indices, rhs_indices, str(qw.scheme), qw.in_features)
        return self._products.gather_dot(x, *weight, qw.transposed, dtype, precision)

    @hookimpl
    def from_numpy(self, array: np.ndarray[Any, Any], device: Any) -> Array:
        """Shared memory on the CPU, where the array is writable and native; bfloat16 as its bits."""
        from quantcore_backends.torch_backend import cpu

        tensor = cpu.from_numpy(array)
        return tensor if device is None else tensor.to(device)

    @hookimpl
    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """A view of a tensor on the CPU, a copy of one elsewhere; bfloat16 as its bits."""
        from quantcore_backends.torch_backend import cpu

        return cpu.to_numpy(array.detach().cpu())


backend = TorchBackend()
