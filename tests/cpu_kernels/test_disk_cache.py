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


FACTORY = """
from numba import types
from quantcore_backends.cpu_kernels.disk_cache import cfunc

def times(factor):
    @cfunc(types.int64(types.int64), cache=True)
    def kernel(x):
        total = 0
        for i in range(x):
            total += factor * i
        return total

    return kernel
"""


def test_kernels_that_two_processes_compiled_serve_a_third(tmp_path: Path) -> None:
    """Their numbers in Numba are the same, and so would be their symbols."""
    (tmp_path / "factory.py").write_text(FACTORY)
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }

    def run(code: str) -> str:
        code = f"from factory import times; {code}"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    assert run("print(times(2).ctypes(5))") == "20"
    assert run("print(times(3).ctypes(5))") == "30"
    both = "a, b = times(2), times(3); print(a._cache_hits, b._cache_hits, a.ctypes(5), b.ctypes(5))"
    assert run(both) == "1 1 20 30"
