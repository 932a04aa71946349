"""QuantizedTensor as a pytree: its arrays are the leaves, everything else is static."""

from collections.abc import Hashable
from functools import cache
from typing import Any, Final

import jax

from quantcore import QuantizedTensor

__all__ = ["register"]

_NAMES: Final = ("packed", "scales", "biases")


def _flatten(qw: QuantizedTensor) -> tuple[tuple[Any, ...], Hashable]:
    static = (qw.scheme, qw.in_features, qw.dtype_name, qw.layout, qw.transposed)
    return (qw.packed, qw.scales, qw.biases), static


def _flatten_with_keys(qw: QuantizedTensor) -> tuple[tuple[tuple[Any, Any], ...], Hashable]:
    leaves, static = _flatten(qw)
    return tuple((jax.tree_util.GetAttrKey(name), leaf) for name, leaf in zip(_NAMES, leaves, strict=True)), static


def _unflatten(static: Any, leaves: Any) -> QuantizedTensor:
    scheme, in_features, dtype, layout, transposed = static
    packed, scales, biases = leaves
    return QuantizedTensor(
        packed, scales, biases, scheme, in_features, dtype=dtype, layout=layout, transposed=transposed
    )


@cache
def register() -> None:
    """Tell JAX, once."""
    jax.tree_util.register_pytree_with_keys(QuantizedTensor, _flatten_with_keys, _unflatten, _flatten)
