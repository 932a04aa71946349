"""Group-wise quantized weights for every Python array library.

``quantize`` makes a :class:`QuantizedTensor`; ``dot(x, qw)`` finds the backend that computes it from the tensor's
annotation. Backends are plugins: see :mod:`quantcore.hookspecs` for the contract.
"""

from typing import TYPE_CHECKING, Any

from quantcore.dispatch import Explanation
from quantcore.doors import DOORS
from quantcore.encode import quantize, quantized_tensor
from quantcore.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    BackendWarning,
    FormatError,
    InexactConversionError,
    NoBackendError,
    PerformanceWarning,
    PluginValidationError,
    QuantcoreError,
    UnsupportedError,
)
from quantcore.explanation import explain
from quantcore.hookspecs import BackendInfo, Call, hookimpl
from quantcore.namespace import array_namespace
from quantcore.ops import dequantize, dot, gather_dot, matmul, prepack, take, tensordot
from quantcore.registry import BackendRecord, State, backends, refresh, register, unregister, use_backend
from quantcore.scheme import Scheme
from quantcore.settings import use_precision
from quantcore.tensor import QuantizedTensor, is_quantized
from quantcore.transfer import to_library

if TYPE_CHECKING:
    from quantcore.formats import Checkpoint, load, save

__all__ = [
    "BackendInfo",
    "BackendNotFoundError",
    "BackendRecord",
    "BackendUnavailableError",
    "BackendWarning",
    "Call",
    "Checkpoint",
    "Explanation",
    "FormatError",
    "InexactConversionError",
    "NoBackendError",
    "PerformanceWarning",
    "PluginValidationError",
    "QuantcoreError",
    "QuantizedTensor",
    "Scheme",
    "State",
    "UnsupportedError",
    "array_namespace",
    "backends",
    "dequantize",
    "dot",
    "explain",
    "gather_dot",
    "hookimpl",
    "is_quantized",
    "load",
    "matmul",
    "prepack",
    "quantize",
    "quantized_tensor",
    "refresh",
    "register",
    "save",
    "take",
    "tensordot",
    "to_library",
    "unregister",
    "use_backend",
    "use_precision",
]

__version__ = "0.1.0"

_FORMATS = frozenset({"Checkpoint", "load", "save"})


def __getattr__(name: str) -> Any:
    if name in _FORMATS:
        from quantcore import formats  # read when first asked for: most programs load no file

        return getattr(formats, name)
    if name in DOORS:
        from importlib import import_module

        return import_module(f"quantcore.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
