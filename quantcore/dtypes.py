"""Dtypes by name, across array libraries.

Every question about a dtype goes through here: ``array_api_compat.isdtype`` rejects NumPy's bfloat16 (which is
``ml_dtypes``' own), and libraries disagree on promotion. Inside quantcore a dtype is its canonical name.
"""

import sys
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final

import ml_dtypes
import numpy as np

from quantcore.errors import UnsupportedError

__all__ = ["LOGICAL_DTYPES", "REAL_FLOATING", "dtype_name", "native_dtype", "numpy_dtype", "result_dtype"]

REAL_FLOATING: Final = ("float16", "bfloat16", "float32", "float64")
"""Names of the dtypes that x may have."""

LOGICAL_DTYPES: Final = ("float16", "bfloat16", "float32")
"""Names of the dtypes that a quantized tensor may dequantize to."""

_WIDTH: Final[Mapping[str, int]] = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


@lru_cache(maxsize=512, typed=True)  # typed: array-api-strict's dtypes warn when compared to NumPy's
def _name_of(dtype: Any) -> str:
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        return str(dtype).rpartition(".")[2]


def dtype_name(dtype: Any) -> str:
    """Canonical name of a dtype object of any library, or of a name.

    Parameters
    ----------
    dtype : object
        ``np.float32``, ``mx.bfloat16``, ``torch.float16``, ``"float32"``, ...

    Returns
    -------
    str
        ``"float32"``, ``"bfloat16"``, ``"uint32"``, ...; byte order is not part of the name.

    Raises
    ------
    TypeError
        If it is no dtype.
    """
    if isinstance(dtype, str) and dtype in _WIDTH:
        return dtype
    if dtype is None or type(dtype).__hash__ is None:
        raise TypeError(f"a dtype, or the name of one, is wanted, not {dtype!r}")
    return _name_of(dtype)


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is that of ``ml_dtypes``."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@lru_cache(maxsize=512)
def _library_dtype(name: str, dtype_class: Any) -> Any:
    prefix = dtype_class.__module__
    while prefix:
        found = getattr(sys.modules.get(prefix), name, None)
        if isinstance(found, dtype_class):
            return found
        prefix = prefix.rpartition(".")[0]
    library = dtype_class.__module__.partition(".")[0]
    raise UnsupportedError(f"{library} has no dtype {name}; cast to one that it has, or move to another library")


def native_dtype(name: str, like: Any) -> Any:
    """The dtype object of that name in the library of `like`.

    Parameters
    ----------
    name : str
        Canonical dtype name.
    like : array
        Any array of the library.

    Raises
    ------
    UnsupportedError
        If the library has no such dtype (array-api-strict has no float16, for one).
    """
    dtype = like.dtype
    if isinstance(dtype, np.dtype):
        return numpy_dtype(name)
    dtype_class: Any = type(dtype)
    return _library_dtype(name, dtype_class)


def result_dtype(x: str, w: str) -> str:
    """Result dtype of a product, by the one rule that holds for every library.

    Equal dtypes stay, float16 with bfloat16 gives float32, else the wider of the two.
    """
    if x == w:
        return x
    if _WIDTH[x] == _WIDTH[w]:
        return "float32"
    return x if _WIDTH[x] > _WIDTH[w] else w
