"""Numba's decorators, with a cache on disk that several processes may fill at once.

Numba numbers a function's cached files by what the index says is there. Two processes that compile different kernels of
one factory at the same time read the same index and take the same number, and what stays is an index in which one
kernel's key names the other's code: wrong results from then on, in every process. Here a file's number follows from
what is in it, so that the worst that can be lost is an entry, which is compiled again.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

__all__ = ["cfunc", "njit"]


class _NumberedByContent(IndexDataCacheFile):
    def save(self, key: Any, data: Any) -> None:
        """Save the code first, so that no index names a file that isn't there."""
        digest = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._data_name(int(digest[:16], 16))
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _NumberedByContent(
            cache_path=locator.get_cache_path(),
            filename_base=self._impl.filename_base,
            source_stamp=locator.get_source_stamp(),
        )


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit``; what is compiled goes to the disk if `cache`."""

    def compiled(function: Callable[..., Any]) -> Any:
        made = numba.njit(**options)(function)
        if cache:
            made._cache = _Cache(function)
        return made

    return compiled


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.cfunc``; what is compiled goes to the disk if `cache`."""

    def compiled(function: Callable[..., Any]) -> Any:
        made: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        if cache:
            made._cache = _Cache(function)
        made.compile()
        return made

    return compiled
