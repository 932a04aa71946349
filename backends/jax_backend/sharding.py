"""Weights that lie on several devices, whole groups and whole words on each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quantcore import QuantizedTensor
from quantcore_backends.jax_backend import explicit
from quantcore_backends.jax_backend.partition import axis_names, device_count, unit

__all__ = ["shard"]


def shard(qw: QuantizedTensor, mesh: Mesh, spec: PartitionSpec) -> QuantizedTensor:
    """The weight laid out over the devices of a mesh: packed codes, scales and biases alike.

    ``quantcore.dot`` with it, under plain ``jax.jit``, is then computed where the parts are. Along the out-features
    each device has its columns of the result; along the in-features the parts' results are added up. The weight itself
    never moves. Where the mesh has explicit axes, the results' types say so; jit or not, products, ``take`` and
    ``dequantize`` need no ``out_sharding``.

    Parameters
    ----------
    qw : QuantizedTensor, shape (..., N, K)
        In JAX's arrays. With several processes, each has the whole of it, and the same.
    mesh : jax.sharding.Mesh
    spec : jax.sharding.PartitionSpec
        Mesh axes along which each axis of the weight is divided, as ``qw.shape`` has them: ``P("model", None)`` along
        the out-features, ``P(None, "model")`` along the in-features. Leading axes can't be divided.

    Returns
    -------
    QuantizedTensor
        With the same values.

    Raises
    ------
    TypeError, ValueError
        If an axis isn't divided into whole parts: along the groups, a part is of whole groups and whole 32-bit words.
        ValueError also for microscaled weights on a mesh with explicit axes.
    """
    if not isinstance(qw, QuantizedTensor):
        raise TypeError(f"shard: takes a QuantizedTensor, not {type(qw).__name__}; call quantcore.quantize first")
    if qw.library != "jax":
        raise TypeError(
            f"shard: the weight ({qw.scheme}, shape {qw.shape}) is in {qw.library}; move it with .to('jax')"
        )
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"shard: spec must be a jax.sharding.PartitionSpec, not {type(spec).__name__}")
    if not qw.scheme.has_biases and explicit.has_explicit_axes(mesh):
        raise ValueError(
            f"shard: {qw.scheme} is computed in array-API code, which can't say how its results lie, as {mesh} wants "
            f"of a weight of shape {qw.shape}; make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * its axes"
        )
    qw = qw.canonical()
    rows, columns = _stored_axes(qw, mesh, spec)
    groups = None if qw.scheme.group_size is None else columns
    leading = (None,) * (qw.ndim - 2)
    lie = {
        "packed": NamedSharding(mesh, PartitionSpec(*leading, rows, columns)),
        "scales": NamedSharding(mesh, PartitionSpec(*leading, rows, groups)),
    }
    leaves, rebuild = qw.flatten()
    return rebuild([_placed(leaf, lie["scales" if place else "packed"]) for place, leaf in enumerate(leaves)])


def _stored_axes(qw: QuantizedTensor, mesh: Mesh, spec: PartitionSpec) -> tuple[Any, Any]:
    """Mesh axes of the stored rows and of the grouped axis, checked."""
    what = f"a weight of shape {qw.shape} ({qw.scheme})"
    if len(spec) > qw.ndim:
        raise ValueError(f"shard: {spec} names {len(spec)} axes of {what}")
    axes = (*spec, *(None,) * (qw.ndim - len(spec)))
    unknown = [name for entry in axes for name in axis_names(entry) if name not in mesh.shape]
    if unknown:
        raise ValueError(f"shard: {spec} names {unknown[0]!r}, but the mesh has {', '.join(map(str, mesh.shape))}")
    if any(axes[:-2]):
        raise ValueError(f"shard: {spec} divides a leading axis of {what}; only the last two can be")
    rows, columns = reversed(axes[-2:]) if qw.transposed else axes[-2:]
    parts = device_count(mesh, rows)
    if qw.packed.shape[-2] % parts:
        raise ValueError(f"shard: the {qw.packed.shape[-2]} rows of {what} aren't {parts} equal parts, as {spec} wants")
    parts, size = device_count(mesh, columns), unit(qw.scheme)
    if parts > 1 and qw.in_features % (parts * size):
        raise ValueError(
            f"shard: the {qw.in_features} elements along the groups of {what} aren't {parts} parts of whole groups and "
            f"whole words, as {spec} wants: their number must be a multiple of {parts} × {size}; divide the other axis"
        )
    return rows, columns


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
