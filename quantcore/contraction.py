"""The bookkeeping of tensordot: which axes meet, which stay, in what order."""

import operator
from dataclasses import dataclass
from typing import Any

from quantcore.tensor import QuantizedTensor

__all__ = ["Contraction"]


@dataclass(frozen=True, slots=True)
class Contraction:
    """Axes of x and w that are contracted pairwise, as non-negative numbers.

    Attributes
    ----------
    x_axes, w_axes : tuple of int
    x_ndim, w_ndim : int
    """

    x_axes: tuple[int, ...]
    w_axes: tuple[int, ...]
    x_ndim: int
    w_ndim: int

    @classmethod
    def of(cls, x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: Any) -> "Contraction":
        """Read tensordot's `axes` and check them against the shapes."""
        x_axes, w_axes = _pairs(x_shape, w_shape, axes)
        if len(x_axes) != len(w_axes):
            raise ValueError(f"tensordot: axes name {len(x_axes)} axes of x but {len(w_axes)} of w")
        x_axes = _normalized("x", x_axes, x_shape)
        w_axes = _normalized("w", w_axes, w_shape)
        for i, j in zip(x_axes, w_axes, strict=True):
            if x_shape[i] != w_shape[j]:
                raise ValueError(
                    f"tensordot: axis {i} of x {x_shape} has {x_shape[i]} elements and axis {j} of w {w_shape} has "
                    f"{w_shape[j]}"
                )
        return cls(x_axes, w_axes, len(x_shape), len(w_shape))

    @property
    def x_free(self) -> tuple[int, ...]:
        """Axes of x that stay."""
        return tuple(i for i in range(self.x_ndim) if i not in self.x_axes)

    @property
    def w_free(self) -> tuple[int, ...]:
        """Axes of w that stay."""
        return tuple(j for j in range(self.w_ndim) if j not in self.w_axes)

    def x_axis_of(self, w_axis: int) -> int:
        """The axis of x that meets this axis of w."""
        return self.x_axes[self.w_axes.index(w_axis)]

    def swapped(self) -> "Contraction":
        """The same with x and w exchanged."""
        return Contraction(self.w_axes, self.x_axes, self.w_ndim, self.x_ndim)

    def batch_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Leading axes of w (all but the last two) that are contracted, and that stay."""
        leading = range(self.w_ndim - 2)
        return (
            tuple(j for j in leading if j in self.w_axes),
            tuple(j for j in leading if j not in self.w_axes),
        )

    def with_last_axis_contracted(self) -> "Contraction":
        """The plan for w's `.mT`."""
        last = {self.w_ndim - 1: self.w_ndim - 2, self.w_ndim - 2: self.w_ndim - 1}
        return Contraction(self.x_axes, tuple(last.get(j, j) for j in self.w_axes), self.x_ndim, self.w_ndim)

    def check_matrix_axis(self, w: QuantizedTensor) -> None:
        """Raise ValueError unless exactly one of the last two axes of w is contracted."""
        taken = [j for j in self.w_axes if j >= self.w_ndim - 2]
        if len(taken) != 1:
            raise ValueError(
                f"tensordot: axes {self.w_axes} of the quantized operand {w.shape} ({w.scheme}) take "
                f"{'both' if taken else 'neither'} of its last two axes, which is no matrix product; contract exactly "
                "one of them, or call .dequantize() first"
            )


def _pairs(x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(axes, int) and not isinstance(axes, bool):
        if not 0 <= axes <= min(len(x_shape), len(w_shape)):
            raise ValueError(f"tensordot: axes={axes} doesn't fit shapes {x_shape} and {w_shape}")
        return tuple(range(len(x_shape) - axes, len(x_shape))), tuple(range(axes))
    try:
        first, second = axes
        return _sequence(first), _sequence(second)
    except (TypeError, ValueError):
        raise TypeError(f"tensordot: axes must be an int or a pair of sequences of ints, not {axes!r}") from None


def _sequence(axes: Any) -> tuple[int, ...]:
    return (operator.index(axes),) if hasattr(axes, "__index__") else tuple(operator.index(a) for a in axes)


def _normalized(name: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"tensordot: axis {axis} of {name} is out of range for shape {shape}")
    found = tuple(axis % len(shape) for axis in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"tensordot: axes {axes} of {name} name one axis twice")
    return found
