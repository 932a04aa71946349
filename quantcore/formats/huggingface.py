"""A GGUF's model as Hugging Face and mlx-lm have it: the names of its tensors, the order of their rows, its config.

What llama.cpp's converter (conversion/llama.py and qwen.py) did to a model is undone: tensors get their names back; for
the architecture llama the rows of q and k, which it orders for rotary positions of neighbouring components, their
order. That moves whole rows and changes none, so that packed weights stay packed.

A model is only translated as a whole. mlx-lm's class must have a place for every tensor and every tensor that it needs
must be there; what it can't compute as llama.cpp does is refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantcore.errors import UnsupportedError
from quantcore.formats.checkpoint import Entry
from quantcore.formats.files import malformed, unsupported
from quantcore.formats.huggingface_config import config_of
from quantcore.formats.huggingface_model import ARCHITECTURES, ROPE_FREQS, Tensor, tensors_of
from quantcore.tensor import QuantizedTensor

__all__ = ["translated"]


def translated(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries under Hugging Face's names, their rows in its order, and the model's config.

    Raises
    ------
    UnsupportedError
        If the architecture isn't known, or mlx-lm's model can't compute what the file says.
    FormatError
        If a key is missing or has the wrong type, or tensors are missing or of another shape than the keys say.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: Hugging Face's names for the architecture {str(name)[:40]!r} aren't known here, only those for "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = config_of(path, entries, metadata, name)
    expected = tensors_of(config, ARCHITECTURES[name])
    _check(path, entries, expected, name)
    found = {}
    for own, entry in entries.items():
        if own != ROPE_FREQS:
            tensor = expected[own]
            found[tensor.name] = _reordered(entry, tensor.heads) if tensor.heads else entry
    return found, config


def _check(path: Path, entries: Mapping[str, Entry], expected: Mapping[str, Tensor], architecture: str) -> None:
    """Raise unless the tensors are just those of the model."""
    for name in entries:
        if name not in expected and name != ROPE_FREQS:
            unsupported(path, f"mlx-lm's {architecture} has no place for the tensor {name[:200]!r}")
    for name, tensor in expected.items():
        if name not in entries and name.endswith(".bias"):
            unsupported(path, f"there is no {name}, and mlx-lm's {architecture} has such biases all or none")
        if name not in entries:
            malformed(path, f"the tensor {name} of a model of {architecture} is missing")
        if entries[name].shape != tensor.shape:
            malformed(path, f"its shape is {entries[name].shape}, the file's keys make it {tensor.shape}", tensor=name)


def _reordered(entry: Entry, heads: int) -> Entry:
    """The entry of a tensor of q or k whose rows are put back from GGUF's order.

    There the first half of a head's components alternates with the second.
    """

    def read() -> Any:
        tensor = entry.read()
        rows = np.arange(entry.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        if not isinstance(tensor, QuantizedTensor):
            return tensor[rows]
        leaves, rebuild = tensor.flatten()
        return rebuild([leaf[rows] for leaf in leaves])

    return replace(entry, read=read)
