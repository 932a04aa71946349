"""Whether two checkpoints hold the same values, tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantcore.formats.checkpoint import Checkpoint
from quantcore.tensor import QuantizedTensor

__all__ = ["Difference", "compare"]

_CHUNK = 1 << 22
"""Elements that are compared in float64 at one time."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor of one checkpoint differs from that of another.

    Parameters
    ----------
    name : str
    missing : str
        ``"first"`` or ``"second"`` where that one lacks it; else empty.
    shapes : tuple or None
        Both, where they differ.
    count : int
        Elements that differ; NaN equals NaN.
    largest : float
        Largest absolute difference; NaN where a NaN or an infinity stands against another value.
    relative : float
        `largest`, divided by the largest magnitude of the first.
    """

    name: str
    missing: str = ""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    count: int = 0
    largest: float = 0.0
    relative: float = 0.0

    def within(self, tolerance: float) -> bool:
        """Whether there is no difference but one of values, relative to the largest, of at most `tolerance`."""
        return not self.missing and self.shapes is None and (self.count == 0 or 0 < tolerance >= self.relative)


def compare(first: Checkpoint, second: Checkpoint) -> Iterator[Difference]:
    """The difference of every tensor that either has, in turn; no more than one pair is in memory."""
    for name in dict.fromkeys([*first, *second]):
        if name not in first or name not in second:
            yield Difference(name, missing="first" if name not in first else "second")
            continue
        yield _difference(name, _values(first[name]), _values(second[name]))


def _values(tensor: Any) -> np.ndarray[Any, Any]:
    if isinstance(tensor, QuantizedTensor):
        return np.asarray(tensor.dequantize(dtype="float32"))
    return np.asarray(tensor)


def _difference(name: str, first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> Difference:
    if first.shape != second.shape:
        return Difference(name, shapes=(first.shape, second.shape))
    a, b = first.reshape(-1), second.reshape(-1)
    whole = all(part.dtype.kind in "iub" for part in (a, b))
    count, largest, magnitude = 0, 0.0, 0.0
    for start in range(0, a.size, _CHUNK):
        own = [part[start : start + _CHUNK] for part in (a, b)]
        x, y = (part.astype(np.complex128 if part.dtype.kind == "c" else np.float64) for part in own)
        # Float64 would round integers of 64 bits.
        differs = own[0] != own[1] if whole else (x != y) & ~((x != x) & (y != y))
        count += int(differs.sum())
        with np.errstate(invalid="ignore", over="ignore"):
            largest = float(np.maximum(largest, np.abs(x[differs] - y[differs]).max(initial=0)))
            magnitude = max(magnitude, float(np.nanmax(np.abs(x), initial=0)))
    return Difference(name, count=count, largest=largest, relative=largest / magnitude if magnitude else largest)
