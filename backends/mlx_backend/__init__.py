"""MLX: its own quantized kernels, Metal on a Mac, CUDA or CPU on Linux."""

import math
from contextlib import suppress
from typing import Any

import numpy as np

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, hookimpl
from quantcore.dtypes import dtype_name
from quantcore.scheme import MODES

__all__ = ["MLXBackend", "backend"]

Array = Any

GROUPS = (32, 64, 128)
"""Group sizes of MLX's affine kernels."""

EXACT_LENGTH = 1024
"""Longest contraction within 1e-12: one float32 accumulator a row gives 1.3e-12 at 4096 and grows with the length."""


class MLXBackend:
    """``mx.quantize``, ``mx.dequantize``, ``mx.quantized_matmul`` and ``mx.gather_qmm`` as a backend.

    What these refuse goes to the array-API backend, in MLX arrays. MLX is lazy and its streams belong to threads:
    each thread makes its own x and evaluates its own result.
    """

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="mlx",
            library="mlx",
            array_types=("mlx.core:array",),
            requires=("mlx.core",),
            install_hint='pip install "mlx[cpu]" (Linux; "mlx[cuda13]" for a GPU) or pip install mlx (Mac)',
            priority=10,
            deviations=(
                "quantize-rounding@gpu",
                "dequantize-fma@gpu",
                "half-weight@gpu",
                "nonfinite-as-nan",
            ),
            shape_dependent=True,
            modes=MODES,
        )

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """What MLX's kernels take, by scheme, shape and device."""
        if call.layout != "row":
            return f"knows the layout 'row' only, not {call.layout!r}"
        if op == "prepack":
            return "has no layout of its own"
        if call.w_shape is None:
            return "needs the shapes"
        in_features = call.w_shape[-2 if call.transposed else -1]
        group = call.scheme.group_size or in_features
        if call.scheme.has_biases and group not in GROUPS:
            return f"MLX's kernels take groups of {', '.join(map(str, GROUPS))}, not {group}"
        if in_features % group:
            return f"MLX's kernels take whole groups, not {in_features} features in groups of {group}"
        if call.x_dtype == "float64":
            return "MLX's kernels refuse float64"
        if call.scheme.bits == 1 and call.device == "gpu" and _on_cuda():
            return "MLX's CUDA kernels give NaN for 1 bit, or refuse it"
        if op == "quantize" and not call.scheme.has_biases and call.device != "gpu":
            return "MLX's encoder on a CPU rounds halves towards zero, and its scales of tiny groups wrap around"
        if op in ("dot", "gather_dot"):
            return _supports_product(call, call.w_shape[-1])
        return True

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        """``mx.quantize``, evaluated outside a trace."""
        import mlx.core as mx

        in_features = w.shape[-1]
        if w.dtype == mx.float64:
            w = w.astype(mx.float32)
        group = scheme.group_size or in_features
        packed, scales, *biases = mx.quantize(w, group_size=group, bits=scheme.bits, mode=scheme.mode)
        _evaluate(mx, packed, scales, *biases)
        return packed, scales, biases[0] if biases else None

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """``mx.dequantize`` in float32, rounded once: in half precision it would round twice."""
        return _dense(qw, qw.flatten()[0], dtype)

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """``mx.quantized_matmul``, either way round."""
        import mlx.core as mx

        wanted = getattr(mx, dtype)
        shape = (*np.broadcast_shapes(x.shape[:-2], qw.shape[:-2]), *x.shape[-2:-1], qw.shape[-2])
        if math.prod(shape) == 0 or x.size == 0:
            return mx.zeros(shape, dtype=wanted)  # MLX's kernel divides by the number of rows
        if 1 < x.ndim < qw.ndim:  # MLX takes the first weight of the stack only, when x has fewer axes
            x = x.reshape(*(1,) * (qw.ndim - x.ndim), *x.shape)
        x, scales, biases = _operands(mx, x, qw, wanted)
        product = mx.quantized_matmul(
            x,
            qw.packed,
            scales,
            biases,
            transpose=not qw.transposed,
            **_scheme(qw),
        )
        return product.astype(wanted)

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """Gather packed slices, then ``mx.dequantize``; NaN where an index is out of range."""
        import mlx.core as mx

        places, inside = _in_range(mx, indices, qw.shape[axis])
        if qw.shape[axis] == 0:
            shape = (*qw.shape[:axis], *indices.shape, *qw.shape[axis + 1 :])
            return mx.full(shape, float("nan"), dtype=getattr(mx, dtype))
        rows = _dense(qw, tuple(mx.take(leaf, places, axis=axis) for leaf in qw.flatten()[0]), dtype)
        return mx.where(_aligned(inside, axis, rows.ndim), rows, _nan(mx, rows))

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """``mx.gather_qmm``; NaN where an index is out of range, which it would read past the end for."""
        import mlx.core as mx

        wanted = getattr(mx, dtype)
        matrices, weights = math.prod(x.shape[:-2]), math.prod(qw.shape[:-2])
        shape = (*np.broadcast_shapes(lhs_indices.shape, rhs_indices.shape), x.shape[-2], qw.shape[-2])
        if math.prod(shape) == 0:
            return mx.zeros(shape, dtype=wanted)
        if x.size == 0 or qw.packed.size == 0:
            return mx.full(shape, float("nan"), dtype=wanted)
        left, left_inside = _in_range(mx, lhs_indices, matrices)
        right, right_inside = _in_range(mx, rhs_indices, weights)
        x, scales, biases = _operands(mx, x, qw, wanted)
        product = mx.gather_qmm(
            x,
            qw.packed,
            scales,
            biases,
            lhs_indices=left,
            rhs_indices=right,
            transpose=not qw.transposed,
            **_scheme(qw),
        ).astype(wanted)
        inside = mx.logical_and(left_inside, right_inside)
        return mx.where(_aligned(inside, 0, product.ndim), product, _nan(mx, product))

    @hookimpl
    def from_numpy(self, array: np.ndarray[Any, Any], device: Any) -> Array:
        """Shared memory where DLPack allows it, else a copy; bfloat16 as its bits."""
        import mlx.core as mx

        if device is not None:
            _check_device(mx, device)
        if dtype_name(array.dtype) == "bfloat16":
            made = _shared(mx, array.view(np.uint16)).view(mx.bfloat16)
            _evaluate(mx, made)
            return made
        return _shared(mx, array)

    @hookimpl
    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """A view of the evaluated array; bfloat16 crosses as its bits."""
        import ml_dtypes
        import mlx.core as mx

        if array.dtype == mx.bfloat16:
            return np.asarray(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.asarray(array)


def _on_cuda() -> bool:
    import mlx.core as mx

    return bool(mx.cuda.is_available())


def _check_device(mx: Any, device: Any) -> None:
    """Raise unless the device, or kind of device, is one that MLX has here; its arrays live in unified memory."""
    kinds = {name: str(kind) for name, kind in (("cpu", mx.cpu), ("gpu", mx.gpu))}
    name = next((name for name, kind in kinds.items() if str(device) in (name, kind, f"Device({name}, 0)")), None)
    if name is None:
        raise ValueError(f"MLX arrays live in unified memory; the device is mx.cpu or mx.gpu, not {device!r}")
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("MLX finds no GPU here")


def _supports_product(call: Call, contracted: int) -> bool | str:
    if call.device == "gpu" and call.transposed and contracted % 64:
        return f"MLX's GPU kernel is wrong for x @ w with {contracted} rows, no multiple of 64"
    if call.precision == "highest" and contracted > EXACT_LENGTH:
        return f"MLX's kernels keep to precision 'highest' up to {EXACT_LENGTH} contracted elements, not {contracted}"
    return True


def _scheme(qw: QuantizedTensor) -> dict[str, Any]:
    scheme = qw.scheme
    return {"group_size": scheme.group_size or qw.in_features, "bits": scheme.bits, "mode": scheme.mode}


def _operands(mx: Any, x: Array, qw: QuantizedTensor, wanted: Any) -> tuple[Array, Array, Array | None]:
    """x, scales and biases in one dtype, the widest of theirs and the result's; scales in bytes stay so.

    float32 on the CPU, whose half-precision kernels accumulate in half.
    """
    on_cpu = mx.default_device() == mx.cpu
    floats = (x, qw.scales, qw.biases) if qw.scheme.has_biases else (x,)
    dtype = mx.float32 if on_cpu or wanted == mx.float64 else mx.result_type(*floats, mx.zeros(0, wanted))
    if not qw.scheme.has_biases:
        return x.astype(dtype), qw.scales, None
    return x.astype(dtype), qw.scales.astype(dtype), qw.biases.astype(dtype)


def _dense(qw: QuantizedTensor, leaves: tuple[Array, ...], dtype: str) -> Array:
    import mlx.core as mx

    packed, *rest = leaves
    shape = (*packed.shape[:-1], qw.in_features)
    if packed.size == 0:
        return mx.zeros(shape, dtype=getattr(mx, dtype))  # mx.dequantize can't reshape an empty array
    if packed.ndim == 1:
        return _dense(qw, tuple(leaf[None] for leaf in leaves), dtype)[0]
    if qw.scheme.has_biases:
        rest = [leaf.astype(mx.float32) for leaf in rest]
    dense = mx.dequantize(packed, rest[0], rest[1] if len(rest) > 1 else None, **_scheme(qw), dtype=mx.float32)
    return dense.astype(getattr(mx, dtype))


def _in_range(mx: Any, indices: Array, length: int) -> tuple[Array, Array]:
    """Indices that are safe to read at, and which were in range: MLX checks none, and reads past the end."""
    signed = indices.astype(mx.int64)
    inside = mx.logical_and(signed >= -length, signed < length)
    wrapped = mx.where(signed < 0, signed + length, signed)
    return mx.clip(wrapped, 0, max(length - 1, 0)).astype(mx.uint32), inside


def _aligned(inside: Array, axis: int, ndim: int) -> Array:
    return inside.reshape(*(1,) * axis, *inside.shape, *(1,) * (ndim - axis - inside.ndim))


def _nan(mx: Any, like: Array) -> Array:
    return mx.array(float("nan"), dtype=like.dtype)


def _shared(mx: Any, array: np.ndarray[Any, Any]) -> Array:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype == np.float64:
        return mx.array(native, dtype=mx.float64)  # from_dlpack and a bare array() make it float32
    try:
        return mx.from_dlpack(native)
    except (AttributeError, BufferError, TypeError, ValueError, RuntimeError):
        return mx.array(native)  # read-only memory, or an MLX without zero-copy import


def _evaluate(mx: Any, *arrays: Array) -> None:
    with suppress(ValueError):  # inside a trace nothing can be evaluated, and nothing needs to be
        mx.eval(*arrays)


backend = MLXBackend()
