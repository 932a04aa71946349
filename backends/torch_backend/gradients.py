"""Gradients of the products with respect to x: again such products, with the weight the other way round.

:func:`dot` and :func:`gather_dot` are what the backend calls. Under ``torch.func``'s transforms and in forward mode
they go through an ``autograd.Function``, since an operator's registered gradient doesn't work there; else to the
operator; and where nothing watches the operator, straight to its CPU kernel, which saves 30 to 60 µs.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.autograd import forward_ad

from quantcore_backends.torch_backend import batching, cpu

__all__ = ["dot", "dot_backward", "gather_dot", "gather_dot_backward", "keep_nothing", "keep_product", "no_backward"]

Tensor = torch.Tensor


def dot(*operands: Any) -> Tensor:
    """``quantcore::dot``, differentiable with respect to x however it is transformed."""
    if _unwatched(*operands[:4]):
        return cpu.dot(*operands)
    result: Tensor = _Dot.apply(*operands) if _transformed() else torch.ops.quantcore.dot(*operands)
    return result


def gather_dot(*operands: Any) -> Tensor:
    """``quantcore::gather_dot``, differentiable with respect to x."""
    if _unwatched(*operands[:4]):
        return cpu.gather_dot(*operands)
    result: Tensor = _GatherDot.apply(*operands) if _transformed() else torch.ops.quantcore.gather_dot(*operands)
    return result


# Bound here, where a call finds them near: torch._C's own namespace is a large table.
_grad_enabled: Final = torch.is_grad_enabled
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_function_modes: Final = torch._C._len_torch_function_stack
_tracing: Final = torch._C._get_tracing_state
_transforms: Final = torch._C._are_functorch_transforms_active


def _unwatched(x: Tensor, packed: Tensor, scales: Tensor, biases: Tensor) -> bool:
    """Whether x is plain memory of the CPU, and no gradient, transform, mode or trace could see the operator."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not ((x.requires_grad or scales.requires_grad or biases.requires_grad) and _grad_enabled())
        and not _transformed()
        and not _dispatch_modes()
        and not _function_modes()
        and _tracing() is None
    )


def _transformed() -> bool:
    return _transforms() or forward_ad._current_level >= 0


def keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the gradient needs: the weight and any indices, and the kind of x."""
    x, packed, scales, biases, *rest = inputs
    *indices, scheme, in_features, transposed, dtype, precision = rest
    ctx.set_materialize_grads(False)  # zeros for scales and biases would look like tangents of theirs
    ctx.save_for_backward(packed, scales, biases, *indices)
    ctx.save_for_forward(packed, scales, biases, *indices)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.options = (scheme, in_features, transposed, dtype, precision)


def dot_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """The gradient of x: ``grad @ w``, summed over the axes along which x was broadcast."""
    if grad is None:
        return (None,) * 9
    _refuse_weight_gradient(ctx)
    scheme, in_features, transposed, _, precision = ctx.options
    dtype = str(ctx.x_dtype).removeprefix("torch.")
    towards_x = dot(grad, *ctx.saved_tensors, scheme, in_features, not transposed, dtype, _of_gradient(precision))
    return (towards_x.sum_to_size(ctx.x_shape), *(None,) * 8)


def gather_dot_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """The gradient of x: each product's, gathered from the other side, summed over the products of one matrix."""
    if grad is None:
        return (None,) * 11
    _refuse_weight_gradient(ctx)
    packed, scales, biases, lhs, rhs = ctx.saved_tensors
    scheme, in_features, transposed, _, precision = ctx.options
    pairs = torch.broadcast_shapes(lhs.shape, rhs.shape)
    flat = grad.reshape(pairs.numel(), *grad.shape[-2:])
    each = torch.arange(pairs.numel(), device=grad.device)
    which = rhs.expand(pairs).reshape(-1)
    wide = "float64" if ctx.x_dtype == torch.float64 else "float32"
    options = (scheme, in_features, not transposed, wide, _of_gradient(precision))
    parts = gather_dot(flat, packed, scales, biases, each, which, *options)
    matrices = ctx.x_shape[:-2].numel()
    target = lhs.expand(pairs).reshape(-1).to(torch.int64)
    target = torch.where(target < 0, target + matrices, target)
    total = parts.new_zeros((matrices, *ctx.x_shape[-2:])).index_add(0, target, parts)
    return (total.to(ctx.x_dtype).reshape(ctx.x_shape), *(None,) * 10)


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For operators without a gradient."""


def no_backward(name: str) -> Callable[..., Any]:
    """The gradient of an operator that has none."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"quantcore::{name} has no gradient; detach what goes into it")

    return backward


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(*operands: Any) -> Tensor:
        result: Tensor = torch.ops.quantcore.dot(*operands)
        return result

    setup_context = staticmethod(keep_product)
    backward = staticmethod(dot_backward)
    vmap = staticmethod(batching.dot_rule(dot))

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *rest: Any) -> Tensor | None:
        _refuse_weight_tangent(rest)
        return None if x is None else dot(x, *ctx.saved_tensors, *ctx.options)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(*operands: Any) -> Tensor:
        result: Tensor = torch.ops.quantcore.gather_dot(*operands)
        return result

    setup_context = staticmethod(keep_product)
    backward = staticmethod(gather_dot_backward)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, *rest: Any) -> Tensor | None:
        _refuse_weight_tangent(rest)
        return None if x is None else gather_dot(x, *ctx.saved_tensors, *ctx.options)


_ONLY_X: Final = (
    "quantcore differentiates products with respect to x only; detach scales and biases, or train the dense weight "
    "that dequantize gives"
)


def _refuse_weight_gradient(ctx: Any) -> None:
    if any(ctx.needs_input_grad[1:4]):
        raise NotImplementedError(_ONLY_X)


def _refuse_weight_tangent(rest: tuple[Any, ...]) -> None:
    if any(isinstance(tangent, torch.Tensor) for tangent in rest[1:3]):
        raise NotImplementedError(_ONLY_X)


def _of_gradient(precision: str) -> str:
    """Gradients of a product in 8-bit activations aren't rounded to 8 bits in their turn."""
    return "default" if precision == "fast" else precision
