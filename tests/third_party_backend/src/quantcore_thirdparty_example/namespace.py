"""The library's array-API functions: NumPy's, on the library's own arrays."""

from functools import wraps
from typing import Any

import numpy as np

from quantcore_thirdparty_example.arrays import Array, unwrap, wrap

__all__ = ["asarray", "astype"]

__array_api_version__ = "2024.12"


def asarray(obj: Any, /, *, dtype: Any = None, device: str | None = None, copy: bool | None = None) -> Array:
    """An array of this library."""
    return Array(np.asarray(unwrap(obj), dtype=dtype, copy=copy))


def astype(x: Array, dtype: Any, /, *, copy: bool = True, device: str | None = None) -> Array:
    """The elements of `x` in another dtype."""
    return Array(x.data.astype(dtype, copy=copy))


def __getattr__(name: str) -> Any:
    found = getattr(np, name)
    if isinstance(found, type) or not callable(found):
        return found  # dtypes and constants

    @wraps(found, updated=())
    def function(*args: Any, **kwargs: Any) -> Any:
        return wrap(found(*map(unwrap, args), **{key: unwrap(value) for key, value in kwargs.items()}))

    return function
