"""The product as a primitive of JAX's: what jit, vmap, grad, scan and the rest do with it.

It is linear in x, and its transpose is the product with the same weight the other way round; so jvp, vjp, linearize and
their compositions follow from two rules. Each platform has its lowering.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering  # JAX has no public name for it
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from quantcore_backends.jax_backend import routes, tiles
from quantcore_backends.jax_backend.partition import Product, divided

__all__ = ["product"]

Array = Any

_product_p: Final = Primitive("quantcore_product")


def _bind(x: Array, packed: Array, scales: Array, biases: Array, which: Array, *, of: Product) -> Array:
    return _product_p.bind(x, packed, scales, biases, which, of=of)


_jitted: Final = jax.jit(_bind, static_argnames=("of",), inline=True)


def product(x: Array, leaves: tuple[Array, ...], which: Array, of: Product) -> Array:
    """Products of matrices of x with chosen weights of a stack.

    Parameters
    ----------
    x : array, shape (P, M, C), float32 or float64
    leaves : tuple of array, shape (E, N, *)
        packed (uint32), scales and biases, of one dtype: float32, float16 or bfloat16.
    which : array, shape (P,), int32
        The weight of each product.
    of : Product

    Returns
    -------
    array, shape (P, M, N), or (P, M, K) along the rows, x's dtype
    """
    return _jitted(x, *leaves, which, of=of)


@_product_p.def_impl  # type: ignore[untyped-decorator]
def _compute(*args: Array, of: Product) -> Array:
    return _jitted(*args, of=of)


@_product_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _shape_of(x: Any, packed: Any, scales: Any, biases: Any, which: Any, *, of: Product) -> Any:
    return ShapedArray((*x.shape[:2], of.columns if of.along_rows else packed.shape[1]), x.dtype)


# --- derivatives ----------------------------------------------------------------------------------------------


def _jvp(primals: Any, tangents: Any, *, of: Product) -> tuple[Array, Any]:
    x, packed, scales, biases, which = primals
    of_x, _, of_scales, of_biases, _ = tangents
    out = product(x, (packed, scales, biases), which, of)
    parts = []
    if not isinstance(of_x, ad.Zero):
        parts.append(product(of_x, (packed, scales, biases), which, of))
    if not (isinstance(of_scales, ad.Zero) and isinstance(of_biases, ad.Zero)):
        moved = (packed, ad.instantiate_zeros(of_scales), ad.instantiate_zeros(of_biases))
        parts.append(product(x, moved, which, of))
    if not parts:
        return out, ad.Zero.from_primal_value(out)
    return out, parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _transpose(cotangent: Any, x: Any, packed: Any, scales: Any, biases: Any, which: Any, *, of: Product) -> list[Any]:
    if not ad.is_undefined_primal(x):
        raise NotImplementedError(
            f"dot: the gradient with respect to a quantized weight ({of.scheme}) isn't defined; differentiate with "
            "respect to x, or put jax.lax.stop_gradient around the weight"
        )
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(x.aval), None, None, None, None]
    back = product(cotangent, (packed, scales, biases), which, of._replace(along_rows=not of.along_rows))
    return [back, None, None, None, None]


ad.primitive_jvps[_product_p] = _jvp
ad.primitive_transposes[_product_p] = _transpose


# --- vmap -----------------------------------------------------------------------------------------------------


def _batch(args: Any, axes: Any, *, of: Product) -> tuple[Array, int]:
    """More rows of x where only x is mapped; else more products, with more weights where those are mapped."""
    length = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    x, *leaves, which = (
        arg if axis is None else jnp.moveaxis(arg, axis, 0) for arg, axis in zip(args, axes, strict=True)
    )
    x_mapped, *leaves_mapped, which_mapped = (axis is not None for axis in axes)
    if not any(leaves_mapped) and not which_mapped:
        _, products, rows, contracted = x.shape
        merged = jnp.swapaxes(x, 0, 1).reshape(products, length * rows, contracted)
        out = product(merged, tuple(leaves), which, of)
        return out.reshape(products, length, rows, out.shape[-1]), 1
    x = x if x_mapped else jnp.broadcast_to(x, (length, *x.shape))
    which = which if which_mapped else jnp.broadcast_to(which, (length, *which.shape))
    if any(leaves_mapped):
        stack = leaves[0].shape[1 if leaves_mapped[0] else 0]
        spread = (
            leaf if mapped else jnp.broadcast_to(leaf, (length, *leaf.shape))
            for leaf, mapped in zip(leaves, leaves_mapped, strict=True)
        )
        leaves = [leaf.reshape(length * stack, *leaf.shape[2:]) for leaf in spread]
        which = which + stack * jnp.arange(length, dtype=which.dtype)[:, None]
    _, products, rows, contracted = x.shape
    out = product(x.reshape(length * products, rows, contracted), tuple(leaves), which.reshape(-1), of)
    return out.reshape(length, products, rows, out.shape[-1]), 0


batching.primitive_batchers[_product_p] = _batch


# --- lowering -------------------------------------------------------------------------------------------------


def _on_cpu(of: Product, x: Array, leaves: tuple[Array, ...], which: Array) -> Array:
    return _unless_empty(routes.on_cpu, of, x, leaves, which)


def _elsewhere(of: Product, x: Array, leaves: tuple[Array, ...], which: Array) -> Array:
    return _unless_empty(tiles.product, of, x, leaves, which)


def _unless_empty(function: Any, of: Product, x: Array, leaves: tuple[Array, ...], which: Array) -> Array:
    shape = (*x.shape[:2], of.columns if of.along_rows else leaves[0].shape[1])
    if 0 in (*shape, x.shape[2], leaves[0].shape[0]):
        return jnp.zeros(shape, x.dtype)
    return function(x, leaves, which, of.scheme, of.columns, along_rows=of.along_rows, precision=of.precision)


def _lowering(local: Any) -> Any:
    def alone(*args: Array, of: Product) -> Array:
        x, packed, scales, biases, which = args
        return local(of, x, (packed, scales, biases), which)

    def together(*args: Array, of: Product) -> Array:
        return divided(local, of)(*args)

    def lower(context: Any, *args: Any, of: Product) -> Any:
        function = together if _on_many(context) else alone
        return mlir.lower_fun(function, multiple_results=False)(context, *args, of=of)

    return lower


prim_requires_devices_during_lowering.add(_product_p)  # as custom_partitioning, which the lowering uses, does


def _on_many(context: Any) -> bool:
    """Whether the module is for several devices whose assignment is known."""
    axes = context.module_context.axis_context
    if not hasattr(axes, "num_devices"):
        return True  # within shard_map
    return axes.num_devices > 1 and axes.device_assignment is not None


mlir.register_lowering(_product_p, _lowering(_on_cpu), platform="cpu")
mlir.register_lowering(_product_p, _lowering(_elsewhere))
