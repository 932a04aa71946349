"""What ``torch.func.vmap`` makes of the operators: one call with an axis more, where they broadcast."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["dot_rule", "weight_rule"]

Tensor = torch.Tensor
Batched = tuple[Tensor, int]


def dot_rule(product: Callable[..., Tensor]) -> Callable[..., Batched]:
    """The rule of `product`, which is ``quantcore::dot`` in a form that can be transformed further."""

    def rule(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, packed: Tensor, scales: Tensor, biases: Tensor, *options: Any
    ) -> Batched:
        x_dim, *weight_dims = in_dims[:4]
        if all(dim is None for dim in weight_dims):
            moved = x.movedim(x_dim, 0)
            if packed.ndim > 2:
                moved = _with_rank(moved, max(moved.ndim, packed.ndim + 1))
            return product(moved, packed, scales, biases, *options), 0
        leaves = [_leading(*pair, info.batch_size) for pair in zip((packed, scales, biases), weight_dims, strict=True)]
        operand = x[None] if x_dim is None else x.movedim(x_dim, 0)
        is_vector = operand.ndim == 2
        if is_vector:
            operand = operand[:, None, :]
        rank = max(operand.ndim, leaves[0].ndim)
        result = product(_with_rank(operand, rank), *(_with_rank(leaf, rank) for leaf in leaves), *options)
        return (result.squeeze(-2) if is_vector else result), 0

    return rule


def weight_rule(name: str) -> Callable[..., Batched]:
    """The rule of an operator whose weight's leading axes are batch axes; indices that are mapped go one by one."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
        operator = getattr(torch.ops.quantcore, name)
        leaves = [_leading(leaf, dim, info.batch_size) for leaf, dim in zip(args[:3], in_dims[:3], strict=True)]
        if name == "dequantize":
            return operator(*leaves, *args[3:]), 0
        indices, *options, axis, dtype = args[3:]
        if in_dims[3] is None:
            return operator(*leaves, indices, *options, axis + 1, dtype), 0
        if any(dim is not None for dim in in_dims[:3]) or axis != 0:
            slices = zip(*leaves, indices.movedim(in_dims[3], 0), strict=True)
            return torch.stack([operator(*part, *options, axis, dtype) for part in slices]), 0
        return operator(*args[:3], indices.movedim(in_dims[3], 0), *options, axis, dtype), 0

    return rule


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _with_rank(tensor: Tensor, rank: int) -> Tensor:
    """Axes of length 1 put in behind the first."""
    return tensor.reshape(tensor.shape[0], *(1,) * (rank - tensor.ndim), *tensor.shape[1:])
