"""The operators ``quantcore::*`` in torch's registry, so that compiling, exporting and transforming know them.

Each has a kernel for the CPU and one for every other device, the shape rule that traces run on, and a rule for
``torch.func.vmap``; products have a gradient with respect to x, which is again such a product. Scales and biases have
none: asking for it is an error.
"""

from collections.abc import Callable
from typing import Any, Final

import torch

from quantcore_backends.torch_backend import batching, cpu, gradients, tiles
from quantcore_backends.torch_backend.cpu import scheme_of

__all__ = ["OPERATORS"]

Tensor = torch.Tensor

_LIBRARY: Final = torch.library.Library("quantcore", "DEF")
_WEIGHT: Final = "Tensor packed, Tensor scales, Tensor biases"

_SCHEMAS: Final = {
    "quantize": "(Tensor w, str scheme) -> (Tensor, Tensor, Tensor)",
    "dequantize": f"({_WEIGHT}, str scheme, int in_features, str dtype) -> Tensor",
    "take": f"({_WEIGHT}, Tensor indices, str scheme, int in_features, int axis, str dtype) -> Tensor",
    "dot": f"(Tensor x, {_WEIGHT}, str scheme, int in_features, bool transposed, str dtype, str precision) -> Tensor",
    "gather_dot": (
        f"(Tensor x, {_WEIGHT}, Tensor lhs, Tensor rhs, str scheme, int in_features, bool transposed, str dtype, "
        "str precision) -> Tensor"
    ),
}

# --- shapes -------------------------------------------------------------------------------------------------------


def _quantize_shape(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    chosen = scheme_of(scheme)
    packed = w.new_empty(chosen.packed_shape(w.shape), dtype=torch.uint32)
    return packed, w.new_empty(chosen.scales_shape(w.shape)), w.new_empty(chosen.scales_shape(w.shape))


def _dequantize_shape(
    packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int, dtype: str
) -> Tensor:
    return scales.new_empty((*packed.shape[:-1], in_features), dtype=getattr(torch, dtype))


def _take_shape(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    indices: Tensor,
    scheme: str,
    in_features: int,
    axis: int,
    dtype: str,
) -> Tensor:
    shape = (*packed.shape[:axis], *indices.shape, *packed.shape[axis + 1 : -1], in_features)
    return scales.new_empty(shape, dtype=getattr(torch, dtype))


def _dot_shape(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    scheme: str,
    in_features: int,
    transposed: bool,
    dtype: str,
    precision: str,
) -> Tensor:
    outputs = in_features if transposed else packed.shape[-2]
    if packed.ndim == 2:
        shape = (*x.shape[:-1], outputs)
    else:
        shape = (*torch.broadcast_shapes(x.shape[:-2], packed.shape[:-2]), x.shape[-2], outputs)
    return x.new_empty(shape, dtype=getattr(torch, dtype))


def _gather_dot_shape(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    scheme: str,
    in_features: int,
    transposed: bool,
    dtype: str,
    precision: str,
) -> Tensor:
    outputs = in_features if transposed else packed.shape[-2]
    shape = (*torch.broadcast_shapes(lhs.shape, rhs.shape), x.shape[-2], outputs)
    return x.new_empty(shape, dtype=getattr(torch, dtype))


# --- registration -------------------------------------------------------------------------------------------------


def _register() -> Any:
    shapes: dict[str, Callable[..., Any]] = {
        "quantize": _quantize_shape,
        "dequantize": _dequantize_shape,
        "take": _take_shape,
        "dot": _dot_shape,
        "gather_dot": _gather_dot_shape,
    }
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, getattr(cpu, name), "CPU")
        _LIBRARY.impl(name, getattr(tiles, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"quantcore::{name}", shapes[name], lib=_LIBRARY)
    for name, backward, keep in (
        ("dot", gradients.dot_backward, gradients.keep_product),
        ("gather_dot", gradients.gather_dot_backward, gradients.keep_product),
        ("quantize", gradients.no_backward("quantize"), gradients.keep_nothing),
        ("dequantize", gradients.no_backward("dequantize"), gradients.keep_nothing),
        ("take", gradients.no_backward("take"), gradients.keep_nothing),
    ):
        torch.library.register_autograd(f"quantcore::{name}", backward, setup_context=keep, lib=_LIBRARY)
    torch.library.register_vmap("quantcore::dot", batching.dot_rule(gradients.dot), lib=_LIBRARY)
    for name in ("dequantize", "take"):
        torch.library.register_vmap(f"quantcore::{name}", batching.weight_rule(name), lib=_LIBRARY)
    return torch.ops.quantcore


OPERATORS: Final = _register()
"""``torch.ops.quantcore``."""
