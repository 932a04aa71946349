"""The CPU kernels on torch tensors: NumPy views of the same memory, no copy. The only module here that calls them."""

from functools import lru_cache
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch

from quantcore import QuantizedTensor, Scheme
from quantcore.dtypes import numpy_dtype
from quantcore_backends import cpu_kernels

__all__ = ["dequantize", "dot", "from_numpy", "gather_dot", "quantize", "take", "to_numpy"]

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]

_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)

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
    return from_numpy(_decode((to_numpy(packed), to_numpy(scales), to_numpy(biases)), scheme, in_features, dtype))


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
    rows = [np.take(to_numpy(leaf), where, axis=axis) for leaf in (packed, scales, biases)]
    return from_numpy(_decode(rows, scheme, in_features, dtype))


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
    qw = _weight(packed, scales, biases, scheme, in_features, transposed)
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
    qw = _weight(packed, scales, biases, scheme, in_features, transposed)
    operands = (to_numpy(x), qw, to_numpy(lhs), to_numpy(rhs), numpy_dtype(dtype))
    return from_numpy(cpu_kernels.gather_dot(*operands, precision))


def _weight(
    packed: Tensor, scales: Tensor, biases: Tensor, scheme: str, in_features: int, transposed: bool
) -> QuantizedTensor:
    # Made anew at each call, for 3 µs: a view kept longer would outlive a resized or moved storage.
    leaves = (to_numpy(packed), to_numpy(scales), to_numpy(biases))
    return QuantizedTensor(*leaves, scheme_of(scheme), in_features, dtype="float32", transposed=transposed)


def _decode(leaves: Any, scheme: str, in_features: int, dtype: str) -> Array:
    return cpu_kernels.decode(leaves, scheme_of(scheme), in_features, numpy_dtype(dtype))
