"""`load`: which format a path holds, found by its content, and the checkpoint that it gives."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from quantcore.errors import FormatError, UnsupportedError
from quantcore.formats import awq, compressed_tensors, gguf, gptq, hqq, huggingface, mlx, onnx, safetensors
from quantcore.formats.checkpoint import Checkpoint, Entry, Rename, dense, renamed, renamer
from quantcore.formats.config import Settings
from quantcore.formats.files import MappedFile, Stored, malformed
from quantcore.formats.folder import Folder, read_folder, read_single

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    library: str = "numpy",
    device: Any = None,
    names: Literal["file", "huggingface"] = "file",
    rename: Rename = None,
    exact: bool = True,
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
    names : {"file", "huggingface"}
        Whose names the tensors of a GGUF get: its own, or those that the model has on the Hugging Face Hub and in
        mlx-lm. With the latter the rows of q and k are in Hugging Face's order too, and `config` is the model's. Other
        formats have Hugging Face's names as a rule, and keep what they have.
    rename : mapping or callable, optional
        From the names in the file, or those that `names` gives, to those of the checkpoint. An MLX config's overrides,
        which go by module, are found under either name, and given under the new one in the checkpoint's `config`.
    exact : bool
        Whether a tensor that can't be converted exactly raises when it is looked up. Where it can, it always is.

    Returns
    -------
    Checkpoint
        A mapping of names to arrays and QuantizedTensors; each is read when it is looked up.

    Raises
    ------
    FormatError
        If the file isn't what its format says it must be; it names the file, the tensor and the byte.
    UnsupportedError
        If it is of a kind that isn't read, which the message names; or if `names` asks for Hugging Face's, and those of
        the model's architecture aren't known.
    InexactConversionError
        On looking up a tensor whose values would change, and by how much, unless `exact` is False.
    FileNotFoundError
        If there is nothing at the path.

    Examples
    --------
    >>> checkpoint = quantcore.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    >>> checkpoint["blk.0.attn_q.weight"]  # doctest: +SKIP
    QuantizedTensor(shape=(576, 576), affine-int4-g32, float32, numpy on cpu, 5.00 bits/weight, 207,360 bytes)
    """
    if names not in ("file", "huggingface"):
        raise ValueError(f"load: names must be 'file' or 'huggingface', not {names!r}")
    place = Path(path)
    name_of = renamer(rename)
    entries, format, config, metadata = _open(place, name_of, exact)
    if names == "huggingface" and format == "gguf":
        entries, config = huggingface.translated(place, entries, metadata)
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


def _open(place: Path, rename: Callable[[str], str], exact: bool) -> _Opened:
    if not place.is_dir():
        return _open_file(place, rename, exact)
    if any(place.glob("*.safetensors")) or any(place.glob("*.safetensors.index.json")):
        return _from_safetensors(read_folder(place), rename, exact)
    return _open_file(_only_file(place), rename, exact)


def _open_file(place: Path, rename: Callable[[str], str], exact: bool) -> _Opened:
    file = MappedFile(place)
    if file.buffer[:4] == gguf.MAGIC:
        entries, metadata = gguf.read_checkpoint(place)
        return entries, "gguf", {}, metadata
    if safetensors.looks_like(file):
        return _from_safetensors(read_single(file), rename, exact)
    start = file.buffer[:4]
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        what = "a pickle or zip: PyTorch's .pt, which can run code and isn't read, or NumPy's .npz, which np.load opens"
        malformed(place, what, offset=0)
    if onnx.looks_like(file):
        return onnx.entries(file, exact=exact), "onnx", {}, {}
    malformed(place, f"not a format that is read: safetensors, GGUF or ONNX (it begins with {start!r})", offset=0)


def _only_file(folder: Path) -> Path:
    found = sorted(file for ending in ("gguf", "onnx") for file in folder.glob(f"*.{ending}") if file.is_file())
    firsts = [file for file in found if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(firsts) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FormatError(f"{folder}: no *.safetensors in it, and not one *.gguf or *.onnx but {names}; name a file")
    return firsts[0]


def _from_safetensors(folder: Folder, rename: Callable[[str], str], exact: bool) -> _Opened:
    tensors, config = folder.tensors, dict(folder.config)
    format, settings = _quantization(folder)
    if format == "mlx":
        assert settings is not None
        quantized, used = mlx.entries(tensors, settings, rename, whole=folder.whole)
        for place in ("quantization", "quantization_config"):
            if isinstance(config.get(place), dict):
                config[place] = mlx.override_names(config[place], rename)
    else:
        quantized, suffixes = _read_as(format, tensors, settings, exact)
        used = {f"{name.removesuffix('weight')}{suffix}" for name in quantized for suffix in suffixes}
    _check_unclaimed(tensors, used, format)
    entries: dict[str, Entry] = {}
    for name, stored in tensors.items():  # in the order of the file, a quantized weight where its first part is
        weight = f"{name.rpartition('.')[0]}.weight"
        if name not in used:
            entries[name] = dense(stored)
        elif weight not in entries:
            entries[weight] = quantized[weight]
    return entries, format, config, folder.metadata


def _read_as(
    format: str, tensors: Mapping[str, Stored], settings: Settings | None, exact: bool
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Quantized weights of a format, and the ends of the names of their parts."""
    if format == "hqq":
        return hqq.entries(tensors, exact=exact), hqq.SUFFIXES
    if format == "safetensors":
        return {}, ()
    assert settings is not None
    module = {"awq": awq, "gptq": gptq, "compressed-tensors": compressed_tensors}[format]
    return module.entries(tensors, settings, exact=exact), module.SUFFIXES


def _quantization(folder: Folder) -> tuple[str, Settings | None]:
    """The format of a folder's quantized tensors, and the config that describes them.

    Raises
    ------
    UnsupportedError
        If the method isn't known.
    """
    file, config = folder.config_file, folder.config
    if config.get("quantization") is not None:
        return "mlx", Settings(config["quantization"], file, "quantization")
    if config.get("quantization_config") is not None:
        settings = Settings(config["quantization_config"], file, "quantization_config")
        method = settings.text("quant_method", default="mlx" if "group_size" in settings.values else None)
        if method not in ("mlx", "awq", "gptq", "hqq", "compressed-tensors"):
            raise UnsupportedError(
                f"{file}: the quantization method {method[:60]!r} isn't read; read are MLX's, awq, gptq, hqq and "
                "compressed-tensors"
            )
        return method, settings
    hqq_like = any(name.rpartition(".")[2] == hqq.MARKER for name in folder.tensors)
    return "hqq" if hqq_like else "safetensors", None


def _check_unclaimed(tensors: Mapping[str, Stored], used: Collection[str], format: str) -> None:
    """Raise where a tensor that nothing claims is part of a quantized weight: it would be taken for data."""
    for name, stored in tensors.items():
        end = name.rpartition(".")[2]
        mlx_like = end == "scales" and f"{name.removesuffix('.scales')}.weight" in tensors
        if name not in used and (mlx_like or end in ("qweight", compressed_tensors.MARKER)):
            says = f"the config says {format}, which has no such tensor"
            if format == "safetensors":
                says = "no config.json beside it says how it is quantized"
            stored.malformed(f"it is part of a quantized weight, but {says}")
