"""Numba's decorators, with a cache on disk that is filled by several processes, one after another or at once.

Functions that a factory makes have one name in Numba, and a number that counts up in each process. Two of them that
were compiled in different processes can so have the same symbol, and a process that loads both from the disk calls one
of them for either. Here what a function closes over is part of its name. It must have a name or a repr that says all
there is to it: numbers, or functions that are made here.

Numba also numbers a function's cached files by what the index says is there. Two processes that look at the same time
take the same number for different code, and what stays is an index in which one key names the other's code. Here a
file's number follows from what is in it: the worst that can be lost is an entry, which is compiled again.

And it looks at a function's own file only to see whether compiled code is still that of the source. What is compiled
has the code of what it calls in it, and kernels share the layout of memory: here all files of the function's package,
and of this one, have a say.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, Final

import numba
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

__all__ = ["CACHED", "COMPILED", "INLINED", "cfunc", "njit"]

COMPILED: Final[dict[str, Any]] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
"""Options of functions that kernels call. Kernels are cached on disk, with what they call."""

CACHED: Final[dict[str, Any]] = {**COMPILED, "cache": True}
"""Options of functions that are also called from Python, or kept on the disk for several callers."""

INLINED: Final[dict[str, Any]] = {**COMPILED, "inline": "always"}
"""Options of functions that become part of what calls them before that is compiled: alone, they never are.

So those that differ between kernels cost less: Numba makes machine code of any function that is called.
"""

_HERE: Final = Path(__file__).parent


@cache
def _digest(folder: Path) -> str:
    """Of all sources in a folder."""
    sources = sorted(folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


class _NumberedByContent(IndexDataCacheFile):
    def save(self, key: Any, data: Any) -> None:
        """Save the code first, so that no index names a file that isn't there."""
        digest = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._data_name(int(digest[:16], 16))
        if not self._load_index():
            self._remove_other_versions()
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})

    def _remove_other_versions(self) -> None:
        """Remove code of other sources, which no index names any more."""
        base = Path(self._index_path).stem
        for path in Path(self._cache_path).glob(f"{escape(base)}.*.nbc"):
            path.unlink(missing_ok=True)


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator, folder = self._impl.locator, Path(function.__code__.co_filename).parent
        self._cache_file = _NumberedByContent(
            cache_path=locator.get_cache_path(),
            filename_base=self._impl.filename_base,
            source_stamp=(locator.get_source_stamp(), _digest(_HERE), _digest(folder)),
        )

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        """By the name, which says what is closed over; Numba pickles that, and functions differ in each process."""
        code = hashlib.sha256(self._py_func.__code__.co_code).hexdigest()
        return signature, codegen.magic_tuple(), self._py_func.__qualname__, code


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its name telling it from others of its factory."""
    if function.__closure__:
        held = [cell.cell_contents for cell in function.__closure__]
        values = [getattr(value, "__qualname__", None) or repr(value) for value in held]
        digest = hashlib.sha256(repr((function.__code__.co_freevars, values)).encode()).hexdigest()
        function.__qualname__ += f"_{digest[:16]}"
    return function


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit``; what is compiled goes to the disk if `cache`."""

    def compiled(function: Callable[..., Any]) -> Any:
        function = _named(function)
        made = numba.njit(**options)(function)
        if cache:
            made._cache = _Cache(function)
        return made

    return compiled


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.cfunc``; what is compiled goes to the disk if `cache`."""

    def compiled(function: Callable[..., Any]) -> Any:
        function = _named(function)
        made: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        if cache:
            made._cache = _Cache(function)
        made.compile()
        return made

    return compiled
