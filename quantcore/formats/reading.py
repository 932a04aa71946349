"""`load`: which format a path holds, found by its content, and the checkpoint that it gives."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcore.errors import FormatError
from quantcore.formats import gguf, safetensors
from quantcore.formats.checkpoint import Checkpoint, Entry, Rename, dense, renamed, renamer
from quantcore.formats.files import MappedFile, malformed
from quantcore.formats.folder import Folder, read_folder, read_single

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    library: str = "numpy",
    device: Any = None,
    rename: Rename = None,
) -> Checkpoint:
    """Open a checkpoint: a file, or a folder with ``config.json`` and its shards.

    Parameters
    ----------
    path : path
        The format is found by what is in it, never by its name.
    library : str
        The array library to give tensors in: ``"numpy"``, ``"mlx"``, ``"torch"``, ...
    device : object, optional
        A device of that library.
    rename : mapping or callable, optional
        From the names in the file to those of the checkpoint.

    Returns
    -------
    Checkpoint
        A mapping of names to arrays and QuantizedTensors; each is read when it is looked up.

    Raises
    ------
    FormatError
        If the file isn't what its format says it must be; it names the file, the tensor and the byte.
    FileNotFoundError
        If there is nothing at the path.
    """
    place = Path(path)
    name_of = renamer(rename)
    entries, format, config, metadata = _open(place)
    return Checkpoint(
        renamed(entries, name_of),
        format=format,
        path=place,
        config=config,
        metadata=metadata,
        library=library,
        device=device,
    )


_Opened = tuple[dict[str, Entry], str, Mapping[str, Any], Mapping[str, Any]]


def _open(place: Path) -> _Opened:
    if place.is_dir():
        if any(place.glob("*.safetensors")) or any(place.glob("*.safetensors.index.json")):
            return _from_safetensors(read_folder(place))
        return _open_file(_only_gguf(place))
    return _open_file(place)


def _open_file(place: Path) -> _Opened:
    file = MappedFile(place)
    if file.buffer[:4] == gguf.MAGIC:
        entries, metadata = gguf.read_checkpoint(place)
        return entries, "gguf", {}, metadata
    if safetensors.looks_like(file):
        return _from_safetensors(read_single(file))
    start = file.buffer[:4]
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        malformed(place, "a pickle or zip (PyTorch's .pt); such files can run code and aren't read", offset=0)
    malformed(place, f"neither safetensors nor GGUF (it begins with {start!r})", offset=0)


def _only_gguf(folder: Path) -> Path:
    found = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    firsts = [file for file in found if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(firsts) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FormatError(f"{folder}: no *.safetensors in it, and not one GGUF checkpoint but {names}; name a file")
    return firsts[0]


def _from_safetensors(folder: Folder) -> _Opened:
    entries = {name: dense(stored) for name, stored in folder.tensors.items()}
    return entries, "safetensors", folder.config, folder.metadata
