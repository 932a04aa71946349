"""What fuzzing holds the readers to: sound files are read, all others raise a FormatError (or name what isn't read)."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import quantcore as qc
from quantcore.formats.gguf_tokenizer import write_tokenizer

__all__ = ["ALLOWANCE", "exercise", "peak_of"]

ALLOWANCE = 1 << 20
"""Bytes beyond twice the file's size that a reader may take: Python's own, for the objects of a small header."""


def exercise(path: Path) -> str:
    """Load a checkpoint, and read and unpack every tensor; what came of it.

    Returns
    -------
    str
        ``"read"``, or the name of the error.

    Raises
    ------
    Exception
        Whatever the readers raise that they must not.
    """
    outcome = "read"
    try:
        checkpoint = qc.load(path, exact=False)
    except (qc.FormatError, qc.UnsupportedError) as error:
        _check_message(error, path)
        return type(error).__name__
    repr(checkpoint)
    for value in checkpoint.metadata.values():
        _look_at(value)
    for name, entry in checkpoint.entries.items():
        try:
            tensor = checkpoint[name]
        except (qc.FormatError, qc.UnsupportedError) as error:
            _check_message(error, path, " tensor ", " byte ")
            outcome = type(error).__name__
            continue
        assert tuple(tensor.shape) == entry.shape
        if qc.is_quantized(tensor):
            assert tensor.scheme is entry.scheme
            if tensor.size <= 1 << 20:
                assert tensor.dequantize().shape == entry.shape
        else:
            tensor.tobytes()
    if checkpoint.format == "gguf":
        _exercise_as_huggingface(path)
    return outcome


def _exercise_as_huggingface(path: Path) -> None:
    """Read what mlx-lm would get of a GGUF: its tensors, its config, its tokenizer."""
    try:
        checkpoint = qc.load(path, names="huggingface")
        json.dumps(dict(checkpoint.config), allow_nan=False)
    except (qc.FormatError, qc.UnsupportedError) as error:
        _check_message(error, path)
        return
    for name, entry in checkpoint.entries.items():
        with suppress(qc.FormatError, qc.UnsupportedError):
            assert tuple(checkpoint[name].shape) == entry.shape
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_tokenizer(path, checkpoint.metadata, Path(folder))
        except (qc.FormatError, qc.UnsupportedError) as error:
            _check_message(error, path)
            assert not list(Path(folder).iterdir())


def peak_of(path: Path) -> int:
    """Bytes at the peak of opening a checkpoint and reading its tensors, one at a time."""
    tracemalloc.start()
    try:
        checkpoint = qc.load(path, exact=False)
        for name in checkpoint:
            with suppress(qc.FormatError, qc.UnsupportedError):
                checkpoint[name]
    except (qc.FormatError, qc.UnsupportedError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def _check_message(error: Exception, path: Path, *needed: str) -> None:
    folder = path if path.is_dir() else path.parent
    for part in (str(folder), *needed):
        assert part in str(error), f"{part!r} isn't in the message: {error}"
    assert len(str(error)) < 2000 + len(str(folder)), "the message repeats too much of the file"


def _look_at(value: Any) -> None:
    if hasattr(value, "__len__"):
        list(value[:100])
        repr(value)[:100]
