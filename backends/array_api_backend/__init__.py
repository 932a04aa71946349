"""Any array-API namespace: the universal fallback, in array-API code alone."""

import math
from typing import Any

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl
from quantcore.scheme import MODES
from quantcore_backends.array_api_backend import indexing, matmul, products, weights

__all__ = ["ArrayAPIBackend", "backend"]

Array = Any


class ArrayAPIBackend:
    """A backend for arrays of whatever library: lowest priority, dense in bounded tiles only."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="array_api",
            library="*",
            priority=-1000,
            deviations=("nonfinite-as-nan@gpu",),
            modes=MODES,
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything in the canonical layout, as far as the device has the dtype to compute in."""
        if call.layout != "row":
            return f"knows the layout 'row' only, not {call.layout!r}"
        if call.device == "gpu" and call.precision == "highest" and op in ("dot", "gather_dot"):
            if matmul.on_tensor_cores():
                return "MLX's float32 matmul on CUDA rounds its operands, too coarsely for precision 'highest'"
            if call.scheme.group_size is None:
                return "needs float64 for precision 'highest' with one group per row, which MLX's GPU lacks"
        return True

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        """Encode along the last axis."""
        return weights.encode(w, scheme)

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """Decode the whole weight."""
        return weights.decode(qw.flatten()[0], qw.scheme, qw.in_features, dtype)

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """Product, a tile of the weight at a time."""
        return products.dot(x, qw, dtype, exact=precision == "highest")

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """Gather packed slices, then decode those."""
        places, inside = indexing.normalized(indices, qw.shape[axis])
        taken = tuple(indexing.take(leaf, places, axis) for leaf in qw.flatten()[0])
        rows = weights.decode(taken, qw.scheme, qw.in_features, dtype)
        return indexing.nan_outside(rows, inside, axis)

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """Products of gathered packed weights."""
        rhs, right_inside = indexing.normalized(rhs_indices, math.prod(qw.shape[:-2]))
        lhs, left_inside = indexing.normalized(lhs_indices, math.prod(x.shape[:-2]))
        leaves, rebuild = qw.flatten()
        chosen = rebuild([indexing.take(indexing.flat_stack(leaf), rhs, 0) for leaf in leaves])
        operand = indexing.take(indexing.flat_stack(x), lhs, 0)
        product = products.dot(operand, chosen, dtype, exact=precision == "highest")
        inside = left_inside if right_inside is None else right_inside & left_inside
        return indexing.nan_outside(product, inside, 0)


backend = ArrayAPIBackend()
