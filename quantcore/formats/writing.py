"""`save`: an MLX checkpoint folder that mlx-lm loads, written in one pass and put into place in one step."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantcore import arrays
from quantcore.errors import InexactConversionError
from quantcore.formats.checkpoint import Checkpoint
from quantcore.formats.files import Array
from quantcore.formats.safetensors_writer import ShardWriter
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor
from quantcore.transfer import to_library

__all__ = ["replacing", "save", "write_checkpoint"]

MLX_GROUPS: Final = (128, 64, 32)
"""What MLX's affine mode takes; groups that are larger become several of these, exactly."""

SHARD_BYTES: Final = 5 << 30
"""Bytes of tensors in a shard, about: mlx-lm's own limit."""

Progress = Callable[[str, int], None]


def save(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write an MLX checkpoint: ``model.safetensors`` or shards, their index, and ``config.json``.

    Parameters
    ----------
    state : mapping of str to array or QuantizedTensor
        Of any array library; a :class:`Checkpoint` is read one tensor at a time. A quantized weight must be named
        ``X.weight``; it is written as ``X.weight``, ``X.scales`` and, where it has them, ``X.biases``.
    path : path
        The folder to make. It appears complete or not at all.
    config : mapping, optional
        The model's config, by default that of a Checkpoint. Its ``quantization`` is replaced by what the tensors
        are: the most frequent scheme for all, the others as overrides of single modules.
    overwrite : bool
        Whether a checkpoint at the path may be replaced. A folder that holds more than a checkpoint never is.
    progress : callable, optional
        Called with the name and the bytes of each tensor once it is written.

    Raises
    ------
    FileExistsError
        If there is something at the path that may not be replaced.
    InexactConversionError
        If a weight has groups of 16, or rows that aren't whole groups, which MLX can't hold.
    TypeError, ValueError
        If a name or a dtype can't be written.

    Notes
    -----
    No more than one tensor is in memory at a time. Groups of 256 and of a row are written as several groups with equal
    scales.

    MLX computes in the scales' dtype. Where that isn't the biases' and the logical one (of GGUF's Q4_1, say, or AWQ's
    weights), both are written as float32, so that no value is rounded; ``qw.astype("float16")`` keeps Q4_1's in half.
    """
    target = Path(path)
    if not isinstance(state, Mapping):
        raise TypeError(f"save: state must be a mapping of names to arrays, not {type(state).__name__}")
    if config is None:
        config = state.config if isinstance(state, Checkpoint) else {}
    with replacing(target, overwrite) as folder:
        write_checkpoint(state, folder, config, progress)


def write_checkpoint(
    state: Mapping[str, Any], folder: Path, config: Mapping[str, Any], progress: Progress | None = None
) -> None:
    """Write shards, index and config into an empty folder; see `save`."""
    _check_config(config)
    schemes = _write_shards(state, folder, progress)
    text = json.dumps(_with_quantization(config, schemes), indent=4)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _check_config(config: Any) -> None:
    """Raise before anything is written where the config is no JSON that can be read back."""
    if not isinstance(config, Mapping):
        raise TypeError(f"save: config must be a mapping, not {type(config).__name__}")
    for key, value in config.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"save: {key!r} of the config can't be written as JSON: {error}") from None


# --- the folder -----------------------------------------------------------------------------------------------


@contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, or vanishes if that isn't reached."""
    _check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        _check_free(target, overwrite)
        if target.exists():
            old = folder.with_suffix(".replaced")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"save: {target} exists; pass overwrite=True (--force) to replace it")
    entries = list(target.iterdir()) if target.is_dir() and not target.is_symlink() else None
    is_checkpoint = entries is not None and (
        not entries or (all(entry.is_file() for entry in entries) and any(e.name == "config.json" for e in entries))
    )
    if not is_checkpoint:
        raise FileExistsError(f"save: {target} isn't a checkpoint folder, which alone is replaced; choose another path")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# --- tensors --------------------------------------------------------------------------------------------------


def _write_shards(state: Mapping[str, Any], folder: Path, progress: Progress | None) -> dict[str, Scheme]:
    """Write all tensors; the scheme of each quantized module."""
    schemes: dict[str, Scheme] = {}
    names: dict[str, str] = {}  # what is written, and for which name of the state
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    writer: ShardWriter | None = None
    name_bytes = 3 * sum(_length_of(name) + len("biases") for name in state)
    try:
        for name in state:
            leaves = _leaves(name, state[name], schemes)
            nbytes = sum(leaf.nbytes for leaf in leaves.values())
            if writer is None or (writer.nbytes and writer.nbytes + nbytes > SHARD_BYTES):
                if writer is not None:
                    writer.close()
                shards.append((folder / f"shard-{len(shards)}.partial", []))
                writer = ShardWriter(shards[-1][0], tensors=3 * len(state), name_bytes=name_bytes)
            for leaf_name, leaf in leaves.items():
                if leaf_name in names:
                    raise ValueError(f"save: {name!r} and {names[leaf_name]!r} are both written as {leaf_name!r}")
                names[leaf_name] = name
                writer.add(leaf_name, leaf)
                shards[-1][1].append(leaf_name)
            total += nbytes
            if progress is not None:
                progress(name, nbytes)
        if writer is None:
            raise ValueError("save: there are no tensors to write")
        _check_not_quantized(names, schemes)
    finally:
        if writer is not None:
            writer.close()
    _name_shards(folder, shards, total)
    return schemes


def _check_not_quantized(names: Collection[str], schemes: Collection[str]) -> None:
    """Raise where dense tensors are called what the parts of a quantized weight are."""
    for name in names:
        module, dot, end = name.rpartition(".")
        if dot and end == "scales" and module not in schemes and f"{module}.weight" in names:
            raise ValueError(
                f"save: {name!r} and '{module}.weight' are dense, but MLX's names for the parts of a quantized weight; "
                "rename one"
            )


def _length_of(name: Any) -> int:
    """Bytes of a name, which must be a string that UTF-8 can hold."""
    if not isinstance(name, str):
        raise TypeError(f"save: names must be strings, not {type(name).__name__}")
    if name == "__metadata__":
        raise ValueError("save: a tensor can't be called '__metadata__', which safetensors keeps for itself; rename it")
    try:
        return len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"save: the name {name!r} can't be written as UTF-8") from None


def _name_shards(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        whole = len(shards) == 1
        final = folder / ("model.safetensors" if whole else f"model-{number:05}-of-{len(shards):05}.safetensors")
        path.rename(final)
        weight_map |= dict.fromkeys(names, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def _leaves(name: str, tensor: Any, schemes: dict[str, Scheme]) -> dict[str, Array]:
    """The NumPy arrays to write for one entry of the state, by their names in the file."""
    if not isinstance(tensor, QuantizedTensor):
        if not arrays.is_array(tensor):
            raise TypeError(f"save: {name!r} must be an array or a QuantizedTensor, not {type(tensor).__name__}")
        arrays.refuse_sparse("save", repr(name), tensor)
        return {name: to_library(tensor, "numpy")}
    module, dot, end = name.rpartition(".")
    if not dot or end != "weight":
        raise ValueError(f"save: MLX names a quantized weight X.weight, not {name!r}; rename it")
    if tensor.transposed:
        raise ValueError(f"save: {name!r} is transposed ({tensor.scheme}); MLX groups the last axis: save its .mT")
    packed, scales, *rest = (to_library(leaf, "numpy") for leaf in tensor.canonical().flatten()[0])
    scheme, repeats = _mlx_scheme(name, tensor)
    schemes[module] = scheme
    if not rest:
        return {name: packed, f"{module}.scales": scales}
    biases = rest[0]
    # MLX computes in the scales' dtype.
    kind = scales.dtype if scales.dtype == biases.dtype and scales.dtype.name == tensor.dtype_name else np.float32
    spread = (part.astype(kind, copy=False) for part in (scales, biases))
    parts = (packed, *(part if repeats == 1 else np.repeat(part, repeats, axis=-1) for part in spread))
    return dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))


def _mlx_scheme(name: str, tensor: QuantizedTensor) -> tuple[Scheme, int]:
    """The scheme that MLX can hold the tensor in, and into how many groups each of its own is split for that."""
    own = tensor.scheme.group_size or tensor.in_features
    group = next((size for size in MLX_GROUPS if own % size == 0), None) if tensor.scheme.has_biases else own
    if group is None or tensor.in_features % own:
        why = f"groups of {own}" if group is None else f"rows of {tensor.in_features}, which aren't whole groups"
        raise InexactConversionError(
            f"save: {name!r} has {why} ({tensor.scheme}); MLX takes rows of whole groups of 32, 64 or 128. Quantized "
            "anew to such a scheme its values would change, as those of any weight that is quantized"
        )
    return Scheme(tensor.scheme.mode, tensor.scheme.bits, group), own // group


# --- the config -----------------------------------------------------------------------------------------------


def _with_quantization(config: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The config, saying how each module is quantized."""
    found = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if schemes:
        common = Counter(schemes.values()).most_common(1)[0][0]
        quantization: dict[str, Any] = _settings(common)
        quantization |= {module: _settings(scheme) for module, scheme in schemes.items() if scheme is not common}
        found |= {"quantization": quantization, "quantization_config": quantization}
    return found


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": scheme.mode}
