"""An array-API namespace whose products accept a QuantizedTensor: unchanged array-API code, quantized weights."""

from collections.abc import Callable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any, Final

import numpy as np

from quantcore import arrays, ops
from quantcore.tensor import QuantizedTensor

__all__ = ["array_namespace"]


def array_namespace(*arrays_: Any) -> Any:
    """Drop-in for ``array_api_compat.array_namespace`` that knows quantized weights.

    Parameters
    ----------
    *arrays_ : array or QuantizedTensor
        All of one library.

    Returns
    -------
    namespace
        The arrays' own namespace, whose ``matmul``, ``tensordot``, ``linalg.matmul``, ``linalg.tensordot``,
        ``take``, ``matrix_transpose`` and ``astype`` accept a QuantizedTensor. Any other function given one raises
        a TypeError.

    Raises
    ------
    TypeError
        If an argument is no array, or if they are of several libraries.
    """
    if len(arrays_) == 1:
        proxy = _of_type.get(type(arrays_[0]))
        if proxy is not None:
            return proxy
    dense = [array.packed if isinstance(array, QuantizedTensor) else array for array in arrays_]
    libraries = {arrays.library_of(array) for array in dense if arrays.is_array(array)}
    if len(libraries) > 1:
        raise TypeError(
            f"array_namespace: arrays of several libraries ({', '.join(sorted(libraries))}); move them with "
            ".to(library) or quantcore.to_library"
        )
    wrapped = arrays.plain_namespace(*dense)
    proxy = _proxies.get(id(wrapped))
    if proxy is None:
        proxy = _proxies[id(wrapped)] = Namespace(wrapped)
    if type(arrays_[0]) is np.ndarray and len(arrays_) == 1:
        _of_type[np.ndarray] = proxy  # other types may be of several namespaces
    return proxy


class Namespace:
    """Proxy of an array-API namespace; attributes are wrapped when first asked for."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.__name__ = f"quantcore.array_namespace({wrapped.__name__})"

    def __getattr__(self, name: str) -> Any:
        made = self._make(name)
        setattr(self, name, made)  # found without __getattr__ from now on
        return made

    def _make(self, name: str) -> Any:
        if name == "linalg":
            return _Linalg(getattr(self._wrapped, name, None), self._wrapped)
        found = getattr(self._wrapped, name)
        if name in _QUANTIZED:
            return _either(name, found, _QUANTIZED[name])
        if isinstance(found, ModuleType):
            return Namespace(found)  # fft and the like
        if name.startswith("_") or isinstance(found, type) or not callable(found):
            return found
        return _guarded(f"{self._wrapped.__name__}.{name}", found)

    def __dir__(self) -> list[str]:
        return dir(self._wrapped)

    def __repr__(self) -> str:
        return f"<{self.__name__}>"


class _Linalg:
    """The ``linalg`` extension: ours knows the two products whether the library has the extension or not."""

    def __init__(self, wrapped: Any, namespace: Any) -> None:
        self._wrapped = wrapped
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        if name in ("matmul", "tensordot"):
            made = _either(name, getattr(self._namespace, name), _QUANTIZED[name])
        elif name == "matrix_transpose":
            made = _either(name, self._namespace.matrix_transpose, _QUANTIZED[name])
        else:
            found = getattr(self._wrapped, name)
            made = _guarded(f"{self._namespace.__name__}.linalg.{name}", found) if callable(found) else found
        setattr(self, name, made)
        return made


def _astype(x: QuantizedTensor, dtype: Any, /, *, copy: bool = True, device: Any = None) -> QuantizedTensor:
    if device is not None:
        raise TypeError("astype: a QuantizedTensor changes device with .to(library, device)")
    return x.astype(dtype)


def _matrix_transpose(x: QuantizedTensor, /) -> QuantizedTensor:
    return x.mT


def _take(x: QuantizedTensor, indices: Any, /, *, axis: int | None = None) -> Any:
    if axis is None:
        raise ValueError("take: a QuantizedTensor needs an axis")
    return ops.take(x, indices, axis=axis)


_QUANTIZED: Final[Mapping[str, Callable[..., Any]]] = {
    "astype": _astype,
    "matmul": ops.matmul,
    "matrix_transpose": _matrix_transpose,
    "take": _take,
    "tensordot": ops.tensordot,
}

_proxies: Final[dict[int, Namespace]] = {}
_of_type: Final[dict[type, Namespace]] = {}


def _either(name: str, dense: Callable[..., Any], quantized: Callable[..., Any]) -> Callable[..., Any]:
    """The library's own function, or ours where an operand is quantized."""

    def function(*args: Any, **kwargs: Any) -> Any:
        for arg in args[:2]:
            if isinstance(arg, QuantizedTensor):
                return quantized(*args, **kwargs)
        return dense(*args, **kwargs)

    function.__name__ = name
    function.__doc__ = dense.__doc__
    return function


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The library's function, refusing quantized operands by name."""

    @wraps(function, updated=())
    def guarded(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if type(arg) not in _PLAIN and _holds_quantized(arg):
                raise _refusal(name)
        if kwargs and any(map(_holds_quantized, kwargs.values())):
            raise _refusal(name)
        return function(*args, **kwargs)

    return guarded


_PLAIN: Final = frozenset({np.ndarray, float, int, bool, str, type(None)})
"""Types that hold no tensor, told from others by one look."""


def _holds_quantized(arg: Any) -> bool:
    if isinstance(arg, list | tuple):
        return any(isinstance(item, QuantizedTensor) for item in arg)
    return isinstance(arg, QuantizedTensor)


def _refusal(name: str) -> TypeError:
    return TypeError(
        f"{name} doesn't take a QuantizedTensor; call .dequantize() for a dense array "
        f"(taken by {', '.join(_QUANTIZED)})"
    )
