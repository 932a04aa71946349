"""The library's array type: NumPy's memory under a type of its own, so that nothing takes it for NumPy's."""

import operator
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

__all__ = ["Array", "unwrap", "wrap"]


class Array(NDArrayOperatorsMixin):
    """An array of this library.

    It is no subclass of ``numpy.ndarray``: that would make it an array of NumPy's for array-api-compat, and so for
    quantcore, whose NumPy backend takes subclasses.
    """

    __slots__ = ("data",)

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self.data = data

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.data.nbytes

    @property
    def device(self) -> str:
        """Where the array is."""
        return "cpu"

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        from quantcore_thirdparty_example import namespace

        return namespace

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # This gives NDArrayOperatorsMixin its operators.
        if any(isinstance(value, np.ndarray) and value.ndim for value in inputs):
            return NotImplemented  # NumPy's arrays are another library's
        return wrap(getattr(ufunc, method)(*map(unwrap, inputs), **kwargs))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an Array becomes NumPy's only when asked: use quantcore.to_library(array, 'numpy')")

    def __getitem__(self, key: Any) -> Any:
        return wrap(self.data[key])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __int__(self) -> int:
        return int(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __index__(self) -> int:
        return operator.index(self.data)

    def __repr__(self) -> str:
        return f"Array({self.data!r})"


def wrap(value: Any) -> Any:
    """NumPy's arrays and scalars as this library's; anything else as it is."""
    return Array(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def unwrap(value: Any) -> Any:
    """This library's arrays as NumPy's, also within a list or tuple; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(unwrap, value))
    return value.data if isinstance(value, Array) else value
