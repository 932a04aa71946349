"""Weights that multiply the same x, put together: one product in place of several."""

from __future__ import annotations

from typing import Any

import quantcore

from .llama import ATTENTION_IN, FFN_IN, merged_name


def merge_layer(weights: dict[str, Any], layer: int) -> None:
    """Merge, in place, a layer's projections of the same x whose weights are stored alike.

    Parameters
    ----------
    weights
        By GGUF's names, dense or quantized; merged ones take the place of their parts.
    layer
        The number of the layer.
    """
    for parts in (ATTENTION_IN, FFN_IN):
        name = f"blk.{layer}"
        names = [f"{name}.{part}.weight" for part in parts]
        if _alike([weights[part] for part in names]):
            weights[merged_name(name, parts)] = _stacked([weights.pop(part) for part in names])


def _alike(tensors: list[Any]) -> bool:
    def storage(tensor: Any) -> Any:
        if not quantcore.is_quantized(tensor):
            return tensor.dtype
        return tensor.scheme, tensor.dtype_name, *(leaf.dtype for leaf in tensor.flatten()[0])

    return all(storage(tensor) == storage(tensors[0]) for tensor in tensors)


def _stacked(tensors: list[Any]) -> Any:
    """The rows of all, in one tensor."""
    if not quantcore.is_quantized(tensors[0]):
        return quantcore.array_namespace(tensors[0]).concat(tensors, axis=0)
    leaves = [tensor.flatten()[0] for tensor in tensors]
    rebuild = tensors[0].flatten()[1]
    xp = quantcore.array_namespace(tensors[0])
    return rebuild([xp.concat(list(parts), axis=0) for parts in zip(*leaves, strict=True)])
