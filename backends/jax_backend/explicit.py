"""Meshes with explicit axes, where an array's type says how it lies, and every operation how its result does.

There, what we compute is for the compiler to divide, as it is elsewhere, and the result's type is said here: as x and
the weight lie, where the axis that is summed over is gone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from quantcore import QuantizedTensor, UnsupportedError
from quantcore_backends.jax_backend.partition import axis_names

__all__ = ["axes_of", "dot_axes", "gathered_axes", "has_explicit_axes", "layer_axes", "taken_axes", "within"]

Array = Any
Axes = tuple[Any, ...]


def has_explicit_axes(mesh: Any) -> bool:
    """Whether types say how arrays lie along some axis of the mesh."""
    kinds = getattr(jax.sharding, "AxisType", None)
    return kinds is not None and kinds.Explicit in (mesh.axis_types or ())


def within(function: Callable[..., Array], axes: Callable[[], Axes], *operands: Any) -> Array:
    """``function(*operands)``, whose result lies along `axes` where the operands are on a mesh with explicit ones.

    Parameters
    ----------
    function : callable
    axes : callable
        What the mesh axes of the result are; called where they are needed.
    *operands : array, or tree of arrays
    """
    mesh = _mesh(operands)
    if mesh is None:
        return function(*operands)
    automatic = getattr(jax.sharding, "auto_axes", None)
    if automatic is None:
        raise UnsupportedError(
            f"JAX {jax.__version__} has no jax.sharding.auto_axes, which quantcore needs on a mesh with explicit axes; "
            "install a newer JAX, or make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * its axes"
        )
    names = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if _is_explicit(kind))
    lie = NamedSharding(mesh, PartitionSpec(*axes()))
    return automatic(function, axes=names, out_sharding=lie)(*operands)


def dot_axes(x: Array, qw: QuantizedTensor) -> Axes:
    """How ``dot(x, qw)`` lies."""
    return (*(None,) * (qw.ndim - max(len(x.shape), 2)), *layer_axes(x, qw))


def layer_axes(x: Array, stack: QuantizedTensor) -> Axes:
    """How x times one weight of a stack lies: along x's rows as x does, else as the weight does, which never moves."""
    return (*_free(axes_of(x)[:-1], stack), _along(stack)[0])


def gathered_axes(x: Array, qw: QuantizedTensor, pairs: int) -> Axes:
    """How ``gather_dot`` of so many axes of pairs lies."""
    return (*(None,) * pairs, *_free(axes_of(x)[-2:-1], qw), _along(qw)[0])


def taken_axes(qw: QuantizedTensor, indices: Array, axis: int) -> Axes:
    """How ``take(qw, indices, axis)`` lies."""
    axes = axes_of(qw.packed)
    kept = {name for place, entry in enumerate(axes) if place != axis for name in axis_names(entry)}
    return (*axes[:axis], *(_without(entry, kept) for entry in axes_of(indices)), *axes[axis + 1 :])


def axes_of(array: Array) -> Axes:
    """The mesh axes of each axis of an array, as far as its type says."""
    entries = tuple(jax.typeof(array).sharding.spec)
    return entries + (None,) * (len(array.shape) - len(entries))


def _along(qw: QuantizedTensor) -> tuple[Any, Any]:
    """Mesh axes of what a product keeps of the weight, and of what it sums over."""
    rows, columns = axes_of(qw.packed)[-2:]
    return (columns, rows) if qw.transposed else (rows, columns)


def _free(entries: Sequence[Any], qw: QuantizedTensor) -> Axes:
    """What is left of x's axes where the weight is divided along some of them, as `partition` has it."""
    taken = {name for entry in _along(qw) for name in axis_names(entry)}
    return tuple(_without(entry, taken) for entry in entries)


def _without(entry: Any, taken: set[str]) -> Any:
    return None if taken & set(axis_names(entry)) else entry


def _is_explicit(kind: Any) -> bool:
    return bool(kind == jax.sharding.AxisType.Explicit)


def _mesh(operands: Any) -> Any:
    """The mesh with explicit axes that an operand is on, or None."""
    for leaf in jax.tree.leaves(operands):
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and not mesh.empty and has_explicit_axes(mesh):
            return mesh
    return None
