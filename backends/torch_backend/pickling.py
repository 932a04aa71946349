"""Pickling tensors over torch: pickle can write torch's uint32 but not read it back (torch 2.13), so int32 crosses."""

import copyreg
from collections.abc import Callable
from typing import Any

import torch

from quantcore import QuantizedTensor

__all__ = ["register"]


def register() -> None:
    """Have pickle, copy and deepcopy take tensors over torch apart as below, and others as before."""
    copyreg.pickle(QuantizedTensor, _reduce)


def _reduce(qw: QuantizedTensor) -> tuple[Any, ...]:
    if not (isinstance(qw.packed, torch.Tensor) and qw.packed.dtype == torch.uint32):
        return qw.__reduce__()
    (packed, *rest), rebuild = qw.flatten()
    return _rebuild, (rebuild, packed.view(torch.int32), *rest)


def _rebuild(rebuild: Callable[..., QuantizedTensor], packed: torch.Tensor, *rest: torch.Tensor) -> QuantizedTensor:
    return rebuild((packed.view(torch.uint32), *rest))
