"""A working backend, as short as it can be: the weight is made dense, and multiplied in float64."""

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl
from quantcore_thirdparty_example.arrays import Array

__all__ = ["backend"]

Dense: TypeAlias = np.ndarray[Any, Any]


class ExampleBackend:
    """The hooks, on this library's arrays."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="thirdparty_example",
            library="quantcore_thirdparty_example",
            array_types=("quantcore_thirdparty_example.arrays:Array",),
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything in the canonical layout."""
        return True if call.layout == "row" else f"knows the layout 'row' only, not {call.layout!r}"

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        """Encode along the last axis."""
        *leading, columns = w.shape
        group, groups = scheme.group_size or columns, scheme.groups(columns)
        filled = np.pad(w.data, [(0, 0)] * len(leading) + [(0, groups * group - columns)], mode="edge")
        values = filled.astype(np.float32).reshape(*leading, groups, group)
        with np.errstate(over="ignore"):
            scale, bias = _scale_and_bias(values, scheme.bits)
            codes = np.clip(np.rint((values - bias) / scale), 0, 2**scheme.bits - 1)
            stored = [np.squeeze(part, -1).astype(w.dtype.newbyteorder("=")) for part in (scale, bias)]
        codes = codes.reshape(*leading, groups * group)[..., :columns]
        return Array(_pack(codes.astype(np.uint8), scheme.bits)), Array(stored[0]), Array(stored[1])

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """Decode the whole weight."""
        dense = _decode(qw, qw.packed.data, qw.scales.data, qw.biases.data, np.float32)
        return Array(_rounded(dense, dtype))

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """Product in float64, whatever the precision asked for."""
        dense = _decode(qw, qw.packed.data, qw.scales.data, qw.biases.data, np.float64)
        with np.errstate(invalid="ignore"):
            product = x.data.astype(np.float64) @ (dense if qw.transposed else np.swapaxes(dense, -1, -2))
        return Array(_rounded(product, dtype))

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """Gather packed slices, then decode those."""
        places = indices.data.astype(np.intp)
        leaves = (np.take(leaf.data, places, axis=axis) for leaf in (qw.packed, qw.scales, qw.biases))
        return Array(_rounded(_decode(qw, *leaves, np.float32), dtype))

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """Products of the chosen matrices."""
        leaves, rebuild = qw.flatten()
        chosen = rebuild([_chosen(leaf, rhs_indices) for leaf in leaves])
        return self.dot(_chosen(x, lhs_indices), chosen, dtype, precision)

    @hookimpl
    def from_numpy(self, array: Dense, device: Any) -> Array:
        """The same memory."""
        if device not in (None, "cpu"):
            raise ValueError(f"this library's arrays live on the cpu, not on {device!r}")
        return Array(array)

    @hookimpl
    def to_numpy(self, array: Array) -> Dense:
        """The same memory."""
        return array.data


def _scale_and_bias(values: Dense, bits: int) -> tuple[Dense, Dense]:
    """Of groups along the last axis, by the rules in quantcore's plugins.md."""
    top = np.float32(2**bits - 1)
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    if bits == 1:
        return scale, low
    from_low = np.abs(low) > np.abs(high)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    steps = np.rint(edge / scale)
    scale = np.divide(edge, steps, out=scale, where=steps != 0)
    return scale, np.where(steps == 0, np.float32(0), edge)


def _decode(qw: QuantizedTensor, packed: Dense, scales: Dense, biases: Dense, dtype: Any) -> Dense:
    bits, columns = qw.scheme.bits, qw.in_features
    octets = np.ascontiguousarray(packed, "<u4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, count=columns * bits, bitorder="little")
    codes = np.packbits(stream.reshape(*packed.shape[:-1], columns, bits), axis=-1, bitorder="little")[..., 0]
    group = np.arange(columns) // (qw.scheme.group_size or columns)
    scale, bias = (part.astype(dtype)[..., group] for part in (scales, biases))
    return codes.astype(dtype) * scale + bias


def _pack(codes: Dense, bits: int) -> Dense:
    *leading, columns = codes.shape
    stream = np.zeros((*leading, -(-columns * bits // 32) * 32), np.uint8)
    places = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    stream[..., : columns * bits] = places.reshape(*leading, columns * bits)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _chosen(stack: Array, indices: Array) -> Array:
    """Matrices of a stack by flat index."""
    matrices = stack.data.reshape(int(np.prod(stack.shape[:-2])), *stack.shape[-2:])
    return Array(np.take(matrices, indices.data.astype(np.intp), axis=0))


def _rounded(dense: Dense, dtype: str) -> Dense:
    with np.errstate(over="ignore"):
        return dense.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


backend = ExampleBackend()
