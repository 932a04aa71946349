"""Folders and files of safetensors: which shards belong together, and the config beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from quantcore.errors import FormatError
from quantcore.formats import safetensors
from quantcore.formats.files import MappedFile, Stored, malformed, read_json

__all__ = ["Folder", "read_folder", "read_single"]

_INDEX: Final = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Folder:
    """The tensors of one or several safetensors files, and what their folder says of them.

    Parameters
    ----------
    path : Path
    tensors : dict of str to Stored
    metadata : dict of str to str
        Of the first shard.
    config : dict
        ``config.json``; empty where there is none. What AutoGPTQ once put into a file of its own is in it, too.
    config_file : Path
    whole : bool
        Whether these are all tensors of the model, as far as one can tell.
    """

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    config: dict[str, Any]
    config_file: Path
    whole: bool


def read_folder(path: Path) -> Folder:
    """Read the headers of all shards of a folder.

    The shards are those that the ``*.safetensors.index.json`` names, else all ``*.safetensors``.

    Raises
    ------
    FormatError
        If there are none, a shard lies outside the folder, is missing, or lacks what the index says it has.
    """
    indexes = sorted(path.glob(f"*{_INDEX}"))
    if len(indexes) > 1:
        raise FormatError(f"{path}: more than one index ({', '.join(file.name for file in indexes)})")
    weight_map = _weight_map(indexes[0]) if indexes else None
    if weight_map is None:
        shards = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    else:
        shards = [path / name for name in sorted(set(weight_map.values()))]
    if not shards:
        raise FormatError(f"{path}: no *.safetensors file in it")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        if not shard.is_file():
            malformed(indexes[0], f"the shard {shard.name} is missing")
        found, its_metadata = safetensors.read_header(MappedFile(shard))
        metadata = metadata or its_metadata
        for name, stored in found.items():
            if name in tensors:
                stored.malformed(f"{tensors[name].file.path.name} has a tensor of that name, too")
            if weight_map is not None and weight_map.get(name) != shard.name:
                stored.malformed(f"the index says it is in {weight_map.get(name)}")
            tensors[name] = stored
    for name in weight_map or ():
        if name not in tensors:
            malformed(indexes[0], f"it isn't in the shard {(weight_map or {})[name]}", tensor=name)
    return Folder(path, tensors, metadata, *_config(path), whole=True)


def read_single(file: MappedFile) -> Folder:
    """Read the header of one file, and the config beside it."""
    tensors, metadata = safetensors.read_header(file)
    shards = [other for other in file.path.parent.glob("*.safetensors") if other.is_file()]
    return Folder(file.path, tensors, metadata, *_config(file.path.parent), whole=len(shards) == 1)


def _config(folder: Path) -> tuple[dict[str, Any], Path]:
    path, separate = folder / "config.json", folder / "quantize_config.json"
    config = read_json(path) if path.exists() else {}
    if "quantization_config" not in config and "quantization" not in config and separate.exists():
        config["quantization_config"] = {"quant_method": "gptq", **read_json(separate)}
        return config, separate
    return config, path


def _weight_map(index: Path) -> Mapping[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        malformed(index, "weight_map must map names to file names")
    for shard, name in {shard: name for name, shard in found.items()}.items():  # a few shards have thousands of names
        if PurePosixPath(shard).name != shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            malformed(index, f"the shard {shard[:200]!r} isn't a file name in this folder", tensor=name)
    return found
