"""Compiled code on disk, where several processes put it at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba import types
from numba.core.caching import IndexDataCacheFile, _SourceFileBackedLocatorMixin

from quantcore_backends.cpu_kernels import disk_cache


def times(factor: int, decorator: Any = disk_cache.cfunc) -> Any:
    @decorator(types.int64(types.int64), cache=True)
    def kernel(x):  # type: ignore[no-untyped-def]
        return x * factor

    return kernel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def meanwhile(monkeypatch: pytest.MonkeyPatch, decorator: Any) -> None:
    """Compile a kernel while another process, which saw the same index, compiles another one: the worst order."""
    save, at_work = IndexDataCacheFile._save_data, [False]

    def interrupted(self: Any, name: str, data: Any) -> None:
        if not at_work[0]:
            at_work[0] = True
            times(3, decorator)
        save(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
        patch.setattr(IndexDataCacheFile, "_save_data", interrupted)
        times(2, decorator)


def test_processes_that_compile_at_once_keep_their_kernels_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, disk_cache.cfunc)
    assert [times(factor).ctypes(7) for factor in (2, 3, 2, 3)] == [14, 21, 14, 21]


def test_numba_s_own_cache_mixes_them_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there is one of our own: when this fails, it may go."""
    meanwhile(monkeypatch, numba.cfunc)
    assert [times(factor, numba.cfunc).ctypes(7) for factor in (2, 3)] != [14, 21]


def test_functions_of_one_factory_have_names_of_their_own(cache: Path) -> None:
    """Names make symbols, which code from two processes' caches shares."""
    assert len({times(factor).__qualname__ for factor in (2, 3, 2)}) == 2


def test_what_was_compiled_is_found_again(cache: Path) -> None:
    assert times(5)._cache_hits == 0
    assert times(5)._cache_hits == 1
    assert times(6)._cache_hits == 0
    assert times(5)._cache_hits == 1
    assert times(6).ctypes(7) == 42


def test_functions_of_several_signatures(cache: Path) -> None:
    def add(x, y):  # type: ignore[no-untyped-def]
        return x + y

    first, again = (disk_cache.njit(cache=True)(add) for _ in range(2))
    assert (first(1, 2), first(1.5, 2.5)) == (3, 4.0)
    assert (again(1, 2), again(1.5, 2.5)) == (3, 4.0)
    assert sum(again.stats.cache_hits.values()) == 2
    assert not again.stats.cache_misses


def test_another_version_of_the_source_is_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times(5)
    monkeypatch.setattr(_SourceFileBackedLocatorMixin, "get_source_stamp", lambda self: "another")
    assert times(5)._cache_hits == 0
    assert times(5)._cache_hits == 1
    assert len(list(cache.rglob("*.nbc"))) == 1  # the code of the one before is gone


def test_another_version_of_a_neighbour_is_compiled_anew(tmp_path: Path) -> None:
    """Numba looks at the function's own file only, and would go on with what the neighbour was."""
    (tmp_path / "neighbour.py").write_text("OFFSET = 1\n")
    (tmp_path / "own.py").write_text(
        "from numba import types\n"
        "from neighbour import OFFSET\n"
        "from quantcore_backends.cpu_kernels.disk_cache import cfunc\n\n"
        "@cfunc(types.int64(types.int64), cache=True)\n"
        "def add(x):\n"
        "    return x + OFFSET\n\n"
        "print(add.ctypes(40), add._cache_hits)\n"
    )

    def printed() -> str:
        return subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    assert [printed(), printed()] == ["41 0", "41 1"]
    (tmp_path / "neighbour.py").write_text("OFFSET = 22  # of another size, lest Python keep its bytecode\n")
    assert [printed(), printed()] == ["62 0", "62 1"]


FACTORY = """
import numpy as np
from numba import types
from quantcore_backends.cpu_kernels.disk_cache import cfunc, njit

def sums(factor):
    @njit()
    def total(x):  # so long that it isn't inlined
        return np.sort(np.full(x, factor)).sum() + np.median(np.full(x, 1.0)) - 1

    return total

_by_two, _by_three = sums(2), sums(3)

def by_two():
    @cfunc(types.int64(types.int64), cache=True)
    def kernel(x):
        return int(_by_two(x))

    return kernel

def by_three():
    @cfunc(types.int64(types.int64), cache=True)
    def kernel(x):
        return int(_by_three(x))

    return kernel
"""


def test_kernels_that_two_processes_compiled_serve_a_third(tmp_path: Path) -> None:
    """The functions that they call have one number in Numba each, and would share a symbol."""
    (tmp_path / "factory.py").write_text(FACTORY)
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }

    def run(code: str) -> str:
        code = f"from factory import by_two, by_three; {code}"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    assert run("print(by_two().ctypes(5))") == "10"
    assert run("print(by_three().ctypes(5))") == "15"
    both = "a, b = by_two(), by_three(); print(a._cache_hits, b._cache_hits, a.ctypes(5), b.ctypes(5))"
    assert run(both) == "1 1 10 15"
