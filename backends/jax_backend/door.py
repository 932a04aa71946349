"""What is public of the JAX backend beyond its hooks: ``quantcore.jax``."""

from typing import Any

import jax.numpy as jnp

import quantcore
from quantcore import QuantizedTensor, Scheme
from quantcore_backends.cpu_kernels import integer
from quantcore_backends.jax_backend import explicit
from quantcore_backends.jax_backend.ffi import block, targets
from quantcore_backends.jax_backend.sharding import shard

__all__ = ["layer_dot", "load", "shard"]

Array = Any


def layer_dot(x: Array, stack: QuantizedTensor, layer: Any, /, **options: Any) -> Array:
    """``dot(x, stack[layer])`` where `layer` may be traced; the weight isn't sliced out of the stack.

    For ``jax.lax.scan`` over layers: scan over their numbers and close over the stack. Scanning over the stack itself
    copies each layer's weight before it is used.

    Parameters
    ----------
    x : array, shape (..., M, K) or (K,), real floating
    stack : QuantizedTensor, shape (L, N, K)
    layer : int or array, shape (), integer
        Negative ones count from the end.
    **options
        `out_dtype`, `precision` and `backend`, as for :func:`quantcore.dot`.

    Returns
    -------
    array, shape (..., M, N) or (N,)
        NaN where a traced `layer` is out of range.

    Raises
    ------
    ValueError, TypeError
        If the shapes don't fit, or `layer` isn't one integer.
    IndexError
        If a `layer` that isn't traced is out of range.

    Examples
    --------
    >>> def step(h, layer):
    ...     return jax.nn.gelu(layer_dot(h, stack, layer)), None
    >>> h, _ = jax.lax.scan(step, x, jnp.arange(stack.shape[0]))
    """
    if not isinstance(stack, QuantizedTensor) or stack.ndim != 3:
        shown = f"shape {stack.shape}" if isinstance(stack, QuantizedTensor) else type(stack).__name__
        raise ValueError(f"layer_dot: the weight must be a QuantizedTensor of shape (L, N, K), not {shown}")
    if jnp.ndim(x) < 1:
        raise ValueError("layer_dot: x has no axis to contract (it is 0-d)")
    layer = jnp.asarray(layer)
    if layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise TypeError(f"layer_dot: layer must be one integer, not {layer.dtype} of shape {layer.shape}")

    def multiplied(x: Array, stack: QuantizedTensor, layer: Array) -> Array:
        rows = x.reshape(1, -1, x.shape[-1])
        made = quantcore.gather_dot(rows, stack, jnp.zeros((), jnp.int32), layer, **options)
        return made.reshape(*x.shape[:-1], made.shape[-1])

    return explicit.within(multiplied, lambda: explicit.layer_axes(x, stack), x, stack, layer)


def load(scheme: Scheme | str, dtype: Any = "float32") -> None:
    """Load the compiled CPU kernels of a scheme, for a module from ``jax.export`` in a process that traced no product.

    Parameters
    ----------
    scheme : Scheme or str
    dtype : dtype or str
        Of the scales and biases.

    Raises
    ------
    RuntimeError
        If the compiled kernels can't be used here.
    ValueError
        If the scheme has none.
    """
    reason = targets.unusable()
    if reason:
        raise RuntimeError(f"load: {reason}")
    scheme = Scheme.parse(scheme)
    if not scheme.has_biases:
        raise ValueError(f"load: {scheme} has no compiled kernels in JAX; it is computed in array-API code")
    kind = targets.KINDS[jnp.dtype(dtype).name]
    for operation in block.OPERATIONS:
        targets.load(operation, scheme.bits, kind)
    if integer.serves(scheme):
        for width in integer.WIDTHS.values():
            for together in range(3):
                targets.load_rounded(scheme, width, together)
