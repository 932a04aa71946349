"""The CPU kernels on torch tensors: NumPy views of the same memory, no copy. The only module here that calls them."""

from functools import lru_cache
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch

from quantcore import QuantizedTensor, Scheme
from quantcore.arrays import refuse_sparse
from quantcore.dtypes import numpy_dtype
from quantcore.settings import check_precision
from quantcore_backends import cpu_kernels

__all__ = ["dequantize", "dot", "from_numpy", "gather_dot", "quantize", "take", "to_numpy"]

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]

# Bound here, where a call finds them near: torch's own namespace is a large table.
_float32: Final = torch.float32
_from_numpy: Final = torch.from_numpy
_empty: Final = np.empty
_single: Final = np.float32
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_KINDS: Final = {getattr(torch, dtype.name): kind for dtype, kind in cpu_kernels.KINDS.items()}
_WEIGHTS: Final = 4096
"""Places and kinds of weights that are remembered."""

scheme_of = lru_cache(maxsize=None)(Scheme.parse)


def to_numpy(tensor: Tensor) -> Array:
    """A view of a CPU tensor's memory; neither torch nor NumPy hands bfloat16 over but as its bits."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(_BFLOAT16)
    return tensor.numpy(force=tensor.is_neg())


def from_numpy(array: Array) -> Tensor:
    """A tensor on the array's memory, or on a copy where torch can't take it: read-only, or byte-swapped."""
    native = np.asarray(array, array.dtype.newbyteorder("="))
    if not native.flags.writeable or any(stride < 0 or stride % native.itemsize for stride in native.strides):
        native = native.copy()
    if native.dtype == _BFLOAT16:
        return torch.from_numpy(native.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(native)


def quantize(w: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`quantcore_backends.cpu_kernels.encode`."""
    packed, scales, biases = map(from_numpy, cpu_kernels.encode(to_numpy(w), scheme_of(scheme)))
    return packed, scales, biases


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int, dtype: str) -> Tensor:
    """See :func:`quantcore_backends.cpu_kernels.decode`."""
    leaves = _leaves(packed, scales, biases, scheme, in_features)
    return from_numpy(cpu_kernels.decode(leaves, scheme_of(scheme), in_features, numpy_dtype(dtype)))


def take(
    packed: Tensor,
    scales: Tensor,
    biases: Tensor,
    indices: Tensor,
    scheme: str,
    in_features: int,
    axis: int,
    dtype: str,
) -> Tensor:
    """Gather packed slices, then decode those."""
    where = to_numpy(indices)
    leaves = _leaves(packed, scales, biases, scheme, in_features)
    rows = tuple(np.take(leaf, where, axis=axis) for leaf in leaves)
    return from_numpy(cpu_kernels.decode(rows, scheme_of(scheme), in_features, numpy_dtype(dtype)))


def dot(
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
    """See :func:`quantcore_backends.cpu_kernels.dot`."""
    check_precision("dot", precision)
    if x.layout is not torch.strided:
        refuse_sparse("dot", "x", x)
    if x.dtype is _float32 and dtype == "float32" and not transposed and x.shape[-1] == in_features:
        weight = _weight_of(packed, scales, biases, scheme, in_features)
        product = None if weight is None else _product_of_integers(x, weight, precision)
        if product is not None:
            return product
    qw = _weight(packed, scales, biases, scheme, in_features, transposed)
    _check_contracted("dot", x, qw)
    return from_numpy(cpu_kernels.dot(to_numpy(x), qw, numpy_dtype(dtype), precision))


def gather_dot(
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
    """See :func:`quantcore_backends.cpu_kernels.gather_dot`."""
    check_precision("gather_dot", precision)
    if x.layout is not torch.strided:
        refuse_sparse("gather_dot", "x", x)
    qw = _weight(packed, scales, biases, scheme, in_features, transposed)
    _check_contracted("gather_dot", x, qw)
    operands = (to_numpy(x), qw, to_numpy(lhs), to_numpy(rhs), numpy_dtype(dtype))
    return from_numpy(cpu_kernels.gather_dot(*operands, precision))


# --- the usual case, kept short: after a large weight, all that a call touches comes from far -----------------------


def _product_of_integers(x: Tensor, weight: cpu_kernels.Weight, precision: str) -> Tensor | None:
    """``x @ w.T`` of float32, or None where integers don't serve."""
    count, columns, outputs = x.numel(), weight.geometry.columns, weight.geometry.rows
    if not count:
        return None
    x = x.contiguous().resolve_neg()
    out = _from_numpy(_empty((*x.shape[:-1], outputs), _single))  # half the time of x.new_empty
    served = cpu_kernels.multiply(x.data_ptr(), count // columns, weight, out.data_ptr(), precision)
    return out if served else None


def _weight_of(
    packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int
) -> cpu_kernels.Weight | None:
    """What the kernels are told of a matrix, or None where those on integers don't take it as it is."""
    if scales.is_neg() or biases.is_neg():
        return None  # memory holds the negative
    addresses = packed.data_ptr(), scales.data_ptr(), biases.data_ptr()
    shapes = packed.shape, scales.shape, biases.shape
    strides = packed.stride(), scales.stride(), biases.stride()
    return _weight_at(addresses, shapes, strides, (packed.dtype, scales.dtype, biases.dtype), scheme, in_features)


@lru_cache(_WEIGHTS)
def _weight_at(
    addresses: tuple[int, int, int],
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    scheme: str,
    in_features: int,
) -> cpu_kernels.Weight | None:
    """As :func:`_weight_of`: it holds whenever arrays of these kinds lie there, and keeps none alive.

    So nothing is known of their values: rows count as independent, however alike they are.
    """
    _check_weight(shapes, dtypes, scheme, in_features)
    (of_packed, of_scales, of_biases), (_, dtype, of_biases_dtype) = strides, dtypes
    chosen, kind = scheme_of(scheme), _KINDS.get(dtype)
    if kind is None or dtype is not of_biases_dtype or of_scales != of_biases or not cpu_kernels.serves(chosen):
        return None
    if len(of_packed) != 2 or (of_packed[1], of_scales[1]) != (1, 1) or not shapes[0][0]:
        return None
    row_bytes = 4 * of_packed[0], dtype.itemsize * of_scales[0]
    geometry = cpu_kernels.Geometry(chosen, in_features, *shapes[0], shapes[1][1], *row_bytes, kind, shapes[0][0])
    return cpu_kernels.Weight(geometry, addresses)


# --- any case -----------------------------------------------------------------------------------------------------


def _weight(
    packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int, transposed: bool
) -> QuantizedTensor:
    # Made anew at each call, for 3 µs: a view kept longer would outlive a moved storage.
    leaves = _leaves(packed, scales, biases, scheme, in_features)
    return QuantizedTensor(*leaves, scheme_of(scheme), in_features, dtype="float32", transposed=transposed)


def _leaves(
    packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int
) -> tuple[Array, Array, Array]:
    """Views of a weight's arrays, after a look at whether they are one's: kernels read where they are told to."""
    leaves = packed, scales, biases
    _check_weight(tuple(leaf.shape for leaf in leaves), tuple(leaf.dtype for leaf in leaves), scheme, in_features)
    return to_numpy(packed), to_numpy(scales), to_numpy(biases)


@lru_cache(_WEIGHTS)
def _check_weight(
    shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], scheme: str, in_features: int
) -> None:
    """Raise ValueError unless arrays of these kinds make a weight."""
    chosen, logical = scheme_of(scheme), (*shapes[0][:-1], in_features)
    packed_shape, scales_shape = chosen.packed_shape(logical), chosen.scales_shape(logical)
    floats = all(dtype.is_floating_point for dtype in dtypes[1:])
    if shapes != (packed_shape, scales_shape, scales_shape) or dtypes[0] is not torch.uint32 or not floats:
        given = ", ".join(f"{tuple(shape)} {dtype}" for shape, dtype in zip(shapes, dtypes, strict=True))
        raise ValueError(
            f"packed, scales and biases of {given} make no weight of shape {logical} in {scheme}: that takes "
            f"{packed_shape} torch.uint32, and twice {scales_shape} of a floating dtype; quantcore.quantize and "
            "quantcore.quantized_tensor make such"
        )


def _check_contracted(op: str, x: Tensor, qw: QuantizedTensor) -> None:
    if x.shape[-1:] != qw.shape[-1:]:
        raise ValueError(
            f"quantcore::{op}: x {tuple(x.shape)} and weight {qw.shape} ({qw.scheme}) don't fit: their last axes must "
            "be of one length"
        )
