"""JAX: the same weights under jit, vmap, grad and scan, on one device or many.

Inside jit, products on the CPU are the project's CPU kernels, called by XLA itself; elsewhere XLA multiplies tiles of
the weight. Concrete arrays on the CPU go to the same kernels directly.
"""

from typing import Any

import numpy as np

from quantcore import BackendInfo, Call, QuantizedTensor, Scheme, UnsupportedError, hookimpl
from quantcore.dtypes import numpy_dtype

__all__ = ["JAXBackend", "backend"]

Array = Any


class JAXBackend:
    """JAX's arrays, concrete or traced."""

    @hookimpl
    def backend_info(self) -> BackendInfo:
        """Describe the backend."""
        return BackendInfo(
            api_version=1,
            name="jax",
            library="jax",
            array_types=("jax:Array", "jax:ShapeDtypeStruct"),
            requires=("jax",),
            install_hint='pip install "quantcore-arrays[jax]" (for a GPU: pip install "jax[cuda13]")',
            priority=10,
            deviations=(
                "dequantize-fma",
                "flush-subnormals",
                "nonfinite-as-nan@gpu",
                "nonfinite-as-nan@tpu",
            ),
        )

    @hookimpl
    def prepare(self) -> None:
        """Tell JAX that a QuantizedTensor is a pytree."""
        from quantcore_backends.jax_backend import pytree

        pytree.register()

    @hookimpl
    def supports(self, op: str, call: Call) -> bool | str:
        """Everything in the canonical layout."""
        if call.layout != "row":
            return f"knows the layout 'row' only, not {call.layout!r}"
        return True

    @hookimpl
    def describe(self, op: str, call: Call) -> str:
        """Which path concrete arrays take and which one a trace, with the reason of a slower one."""
        from quantcore_backends.jax_backend import paths

        return paths.described(op, call)

    @hookimpl
    def quantize(self, w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
        """Encode along the last axis; concrete arrays on the CPU bit for bit as NumPy's are."""
        from quantcore_backends import cpu_kernels
        from quantcore_backends.jax_backend import codes, eager

        if eager.concrete(w):
            packed, scales, biases = cpu_kernels.encode(np.asarray(w), scheme)
            return eager.like(packed, w), eager.like(scales, w), eager.like(biases, w)
        return codes.encode(w, scheme)

    @hookimpl
    def dequantize(self, qw: QuantizedTensor, dtype: str) -> Array:
        """Decode the whole weight."""
        from quantcore_backends.jax_backend import eager, explicit

        eager.check_values("dequantize", qw)
        leaves = qw.flatten()[0]
        if eager.concrete(*leaves):
            return _decoded(qw, leaves, dtype)
        return explicit.within(
            lambda *leaves: _decoded(qw, leaves, dtype), lambda: explicit.axes_of(qw.packed), *leaves
        )

    @hookimpl
    def dot(self, x: Array, qw: QuantizedTensor, dtype: str, precision: str) -> Array:
        """Product of x with the weight, either way round."""
        from quantcore_backends import cpu_kernels
        from quantcore_backends.jax_backend import eager, explicit, products

        eager.check_values("dot", qw)
        wanted = _available(dtype)
        if eager.concrete(x, *qw.flatten()[0]):
            return eager.like(cpu_kernels.dot(np.asarray(x), eager.viewed(qw), wanted, precision), x)
        return explicit.within(
            lambda x, qw: products.dot(x, qw, wanted, precision=precision), lambda: explicit.dot_axes(x, qw), x, qw
        )

    @hookimpl
    def take(self, qw: QuantizedTensor, indices: Array, axis: int, dtype: str) -> Array:
        """Gather packed slices, then decode those; where indices are traced, NaN for one out of range."""
        from quantcore_backends.jax_backend import eager, explicit, products

        _available(dtype)
        if eager.concrete(indices, *qw.flatten()[0]):
            where = np.asarray(indices)
            products.check_indices(where, qw.shape[axis])
            leaves = tuple(eager.like(np.take(np.asarray(leaf), where, axis=axis), leaf) for leaf in qw.flatten()[0])
            return _decoded(qw, leaves, dtype)

        def taken(qw: QuantizedTensor, indices: Array) -> Array:
            places, inside = products.in_range(indices, qw.shape[axis])
            leaves = tuple(products.take(leaf, places, axis) for leaf in qw.flatten()[0])
            return products.nan_outside(_decoded(qw, leaves, dtype), inside, axis)

        return explicit.within(taken, lambda: explicit.taken_axes(qw, indices, axis), qw, indices)

    @hookimpl
    def gather_dot(
        self, x: Array, qw: QuantizedTensor, lhs_indices: Array, rhs_indices: Array, dtype: str, precision: str
    ) -> Array:
        """Products of chosen matrices, which the kernels find in the stack: no weight is copied."""
        from quantcore_backends import cpu_kernels
        from quantcore_backends.jax_backend import eager, explicit, products

        wanted = _available(dtype)
        if eager.concrete(x, lhs_indices, rhs_indices, *qw.flatten()[0]):
            lhs, rhs = np.asarray(lhs_indices), np.asarray(rhs_indices)
            return eager.like(cpu_kernels.gather_dot(np.asarray(x), eager.viewed(qw), lhs, rhs, wanted, precision), x)

        def gathered(x: Array, qw: QuantizedTensor, lhs: Array, rhs: Array) -> Array:
            return products.gather_dot(x, qw, lhs, rhs, wanted, precision=precision)

        pairs = max(len(lhs_indices.shape), len(rhs_indices.shape))
        lie = (x, qw, pairs)
        return explicit.within(gathered, lambda: explicit.gathered_axes(*lie), x, qw, lhs_indices, rhs_indices)

    @hookimpl
    def from_numpy(self, array: np.ndarray[Any, Any], device: Any) -> Array:
        """JAX's array, on a device, under a sharding, or on the first device of a platform that is named."""
        import jax

        from quantcore_backends.jax_backend import eager

        _available(array.dtype.name)
        return eager.from_numpy(array, jax.devices(device)[0] if isinstance(device, str) else device)

    @hookimpl
    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """NumPy's array; a read-only view of the same memory on the CPU."""
        return np.asarray(array)


def _available(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, if JAX has it at the moment."""
    import jax

    if dtype in ("float64", "int64", "uint64") and not jax.config.jax_enable_x64:
        raise UnsupportedError(
            f"JAX has {dtype} only where 64-bit types are enabled: jax.config.update('jax_enable_x64', True)"
        )
    return numpy_dtype(dtype)


def _decoded(qw: QuantizedTensor, leaves: tuple[Array, ...], dtype: str) -> Array:
    from quantcore_backends import cpu_kernels
    from quantcore_backends.jax_backend import codes, eager

    wanted = _available(dtype)
    packed, scales, biases = leaves
    if eager.concrete(packed, scales, biases):
        views = (np.asarray(packed), np.asarray(scales), np.asarray(biases))
        return eager.like(cpu_kernels.decode(views, qw.scheme, qw.in_features, wanted), packed)
    return codes.decode(packed, scales, biases, qw.scheme, qw.in_features).astype(wanted)


backend = JAXBackend()
