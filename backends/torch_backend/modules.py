"""Layers with quantized weights, as ``torch.nn.Module``s."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

import quantcore
from quantcore import QuantizedTensor, Scheme
from quantcore.dtypes import LOGICAL_DTYPES, dtype_name

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedWeight"]

Tensor = torch.Tensor


class QuantizedWeight(nn.Module):
    """The arrays of a :class:`~quantcore.QuantizedTensor` as buffers; layers that share a weight share this module.

    ``packed``, ``scales`` and, where there are any, ``biases`` are its state_dict. ``.to(device)`` moves them.
    ``.half()``, ``.bfloat16()``, ``.float()`` and ``.to(dtype)`` change the logical dtype alone, as
    ``QuantizedTensor.astype`` does: the weight stays what it was to the last bit, and the way back loses nothing. A
    state_dict with scales of another dtype than the module's is loaded in the state_dict's.

    Parameters
    ----------
    tensor : QuantizedTensor over torch tensors, layout "row", not transposed
    """

    packed: Tensor
    scales: Tensor
    biases: Tensor | None

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        if not isinstance(tensor, QuantizedTensor) or tensor.library != "torch":
            kind = f"one of {tensor.library}" if isinstance(tensor, QuantizedTensor) else type(tensor).__name__
            raise TypeError(f"takes a QuantizedTensor over torch tensors, not {kind}; qw.to('torch') makes one")
        if tensor.transposed:
            raise ValueError(f"takes a weight with the groups along its last axis; this one, {tensor}, is an .mT")
        tensor = tensor.canonical()
        self.scheme, self.in_features, self.logical_dtype = tensor.scheme, tensor.in_features, tensor.dtype_name
        for name in ("packed", "scales", "biases"):
            leaf = getattr(tensor, name)
            self.register_buffer(name, None if leaf is None else leaf.detach())

    def forward(self) -> QuantizedTensor:
        """The tensor."""
        return QuantizedTensor(
            self.packed, self.scales, self.biases, self.scheme, self.in_features, dtype=self.logical_dtype
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = self._floats()
        like = torch.empty(0, dtype=getattr(torch, self.logical_dtype), device=self.scales.device)
        wanted = dtype_name(fn(like).dtype)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after: Tensor = getattr(self, name)
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if wanted in LOGICAL_DTYPES:
            self.logical_dtype = wanted
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, own in self._floats().items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.is_floating_point() and given.dtype != own.dtype:
                self._buffers[name] = own.to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _floats(self) -> dict[str, Tensor]:
        """Scales and biases, as far as they are floats."""
        found = {"scales": self.scales, "biases": self.biases}
        return {name: leaf for name, leaf in found.items() if leaf is not None and leaf.is_floating_point()}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "packed": self.packed.view(torch.int32)}  # see pickling.py
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers["packed"] = self.packed.view(torch.uint32)

    def extra_repr(self) -> str:
        """Shape, scheme, dtype and size."""
        tensor = self()
        return f"{tensor.shape}, {tensor.scheme}, {tensor.dtype_name}, {tensor.bits_per_weight:.2f} bits/weight"


class _Layer(nn.Module):
    """A layer whose one matrix is quantized."""

    quantized: QuantizedWeight

    @property
    def weight(self) -> QuantizedTensor:
        """The weight; ``layer.quantized`` is the module that holds its arrays."""
        return self.quantized()

    @property
    def scheme(self) -> Scheme:
        """How the weight is quantized."""
        return self.quantized.scheme


class QuantizedLinear(_Layer):
    """``x @ weight.T + bias`` with a quantized weight: ``nn.Linear``'s counterpart.

    Its state_dict has ``quantized.packed``, ``quantized.scales``, ``quantized.biases`` and, where there is one,
    ``bias``. The weight is no parameter and gets no gradient; x and the bias do.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    scheme : Scheme or str
    device, dtype : optional
        As for ``nn.Linear``; dtype is the weight's logical dtype.

    Notes
    -----
    The weight is zero until a state_dict is loaded. :meth:`from_linear` and :meth:`from_tensor` make layers with one.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme | str = "affine-int4-g64",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.quantized = QuantizedWeight(_zeros((out_features, in_features), scheme, device, dtype))
        vector = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if vector is None else nn.Parameter(vector))

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme | str = "affine-int4-g64", *, pad: bool = False) -> Self:
        """Quantize a dense layer's weight, on its device; the bias is shared with it.

        Raises
        ------
        TypeError, ValueError
            As :func:`quantcore.quantize` does.
        """
        return cls.from_tensor(quantcore.quantize(linear.weight.detach(), scheme, pad=pad), linear.bias)

    @classmethod
    def from_tensor(cls, weight: QuantizedTensor | QuantizedWeight, bias: Tensor | None = None) -> Self:
        """A layer on a weight (out, in) that is quantized already, without a copy.

        Parameters
        ----------
        weight : QuantizedTensor over torch tensors, or QuantizedWeight
            A QuantizedWeight is shared with the layers that have it.
        bias : Tensor or Parameter, optional, shape (out,)
        """
        quantized = _held(weight)
        outputs = quantized.packed.shape[0]
        if bias is not None and tuple(bias.shape) != (outputs,):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; a weight of shape {quantized().shape} takes {outputs}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.quantized = quantized
        is_parameter = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if is_parameter else nn.Parameter(bias))  # type: ignore[arg-type]
        return self

    @property
    def in_features(self) -> int:
        """Length of x's last axis."""
        return self.quantized.in_features

    @property
    def out_features(self) -> int:
        """Length of the result's last axis."""
        return int(self.quantized.packed.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """``quantcore.dot(x, weight) + bias``."""
        product: Tensor = quantcore.dot(x, self.weight)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """As ``nn.Linear``'s."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(_Layer):
    """Rows of a quantized table by index: ``nn.Embedding``'s counterpart. Only the rows asked for are unpacked.

    Its state_dict has ``quantized.packed``, ``quantized.scales`` and ``quantized.biases``. The table gets no gradient,
    so that ``padding_idx``, ``sparse`` and ``scale_grad_by_freq`` mean nothing here; ``max_norm``, which changes the
    table in place, isn't supported.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    scheme : Scheme or str
    device, dtype : optional
        As for ``nn.Embedding``; dtype is the rows' dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme | str = "affine-int4-g64",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.quantized = QuantizedWeight(_zeros((num_embeddings, embedding_dim), scheme, device, dtype))

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: Scheme | str = "affine-int4-g64", *, pad: bool = False
    ) -> Self:
        """Quantize a dense layer's table, on its device.

        Raises
        ------
        TypeError, ValueError
            As :func:`quantcore.quantize` does; ValueError where the layer has a ``max_norm``.
        """
        if embedding.max_norm is not None:
            raise ValueError("an Embedding with max_norm changes its table when it is called; it can't be quantized")
        return cls.from_tensor(quantcore.quantize(embedding.weight.detach(), scheme, pad=pad))

    @classmethod
    def from_tensor(cls, weight: QuantizedTensor | QuantizedWeight) -> Self:
        """A layer on a table that is quantized already, without a copy; a QuantizedWeight is shared."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.quantized = _held(weight)
        return self

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.quantized.packed.shape[0])

    @property
    def embedding_dim(self) -> int:
        """Length of a row."""
        return self.quantized.in_features

    def forward(self, indices: Tensor) -> Tensor:
        """``quantcore.take(weight, indices)``."""
        rows: Tensor = quantcore.take(self.weight, indices, axis=0)
        return rows

    def extra_repr(self) -> str:
        """As ``nn.Embedding``'s."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _held(weight: QuantizedTensor | QuantizedWeight) -> QuantizedWeight:
    quantized = weight if isinstance(weight, QuantizedWeight) else QuantizedWeight(weight)
    if quantized.packed.ndim != 2:
        raise ValueError(f"the weight of a layer has 2 axes, not {quantized.packed.ndim}: {quantized()}")
    return quantized


def _zeros(shape: tuple[int, int], scheme: Scheme | str, device: Any, dtype: torch.dtype | None) -> QuantizedTensor:
    chosen = Scheme.parse(scheme)
    packed = torch.zeros(chosen.packed_shape(shape), dtype=torch.uint32, device=device)
    if chosen.has_biases:
        scales = torch.zeros(chosen.scales_shape(shape), dtype=dtype, device=device)
        return quantcore.quantized_tensor(packed, scales, scales.clone(), shape, chosen)
    scales = torch.zeros(chosen.scales_shape(shape), dtype=torch.uint8, device=device)
    logical = torch.get_default_dtype() if dtype is None else dtype
    return quantcore.quantized_tensor(packed, scales, None, shape, chosen, dtype=logical)
