"""How a config says that a model's rotary positions are scaled, of what GGUF says of it in keys and in a tensor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings, shortest_decimal
from quantcore.formats.files import Array, malformed, unsupported
from quantcore.formats.huggingface_model import ROPE_FREQS

__all__ = ["rope_scaling"]

_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all of Llama 3.1, 3.2 and 3.3 have; only their factors differ."""


def rope_scaling(
    values: Settings, name: str, entries: Mapping[str, Entry], head_size: int, theta: float
) -> dict[str, Any] | None:
    """The config's rope_scaling, None where positions aren't scaled.

    Parameters
    ----------
    values : Settings
        The file's key-values.
    name : str
        The architecture, with which their keys begin.
    entries : mapping of str to Entry
        The tensors, by GGUF's names.
    head_size : int
    theta : float
        The base of the frequencies.

    Raises
    ------
    UnsupportedError
        If mlx-lm's model scales them otherwise than the file says.
    FormatError
        If a key has the wrong type, or the tensor of divisors the wrong shape, dtype or values.
    """
    factors = [key for key in (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear") if key in values.values]
    kind = values.text(f"{name}.rope.scaling.type", default="linear")
    if values.number(f"{name}.rope.scaling.attn_factor", default=1.0) != 1:
        unsupported(values.file, f"{name}.rope.scaling.attn_factor isn't 1")
    if kind not in ("none", "linear"):
        unsupported(values.file, f"{name}.rope.scaling.type is {kind[:40]!r}; only none and linear are converted")
    linear = kind == "linear" and bool(factors)
    if name == "llama" and ROPE_FREQS in entries:
        if linear:
            unsupported(values.file, f"rotary positions are scaled by {ROPE_FREQS} and linearly, too")
        return _llama3(values.file, entries[ROPE_FREQS], head_size, theta)
    if ROPE_FREQS in entries:
        unsupported(values.file, f"mlx-lm's {name} has no place for the tensor {ROPE_FREQS!r}")
    if not linear:
        return None
    return {"rope_type": "linear", "type": "linear", "factor": shortest_decimal(values.number(*factors))}


def _llama3(path: Path, entry: Entry, head_size: int, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3 that divides the frequencies by just these numbers.

    GGUF has the divisors, mlx-lm computes them from Llama 3's rule; so the rule is computed and compared.
    """
    if entry.shape != (head_size // 2,) or entry.dtype != "float32":
        malformed(path, f"expected {head_size // 2} float32, not {entry.dtype} of {entry.shape}", tensor=ROPE_FREQS)
    stored: Array = np.asarray(entry.read(), np.float64)
    if not (np.isfinite(stored).all() and stored.min() > 0):
        malformed(path, "a divisor of a frequency isn't a positive number", tensor=ROPE_FREQS)
    factor = shortest_decimal(float(stored.max()))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        unsupported(path, f"the tensor {ROPE_FREQS!r} isn't what Llama 3 scales rotary positions by")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
