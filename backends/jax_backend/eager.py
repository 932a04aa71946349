"""Concrete arrays on one CPU device, through NumPy's view of the same memory: nothing is traced or compiled."""

from typing import Any

import jax
import numpy as np

from quantcore import QuantizedTensor
from quantcore.memory import aligned

__all__ = ["check_values", "concrete", "from_numpy", "like", "viewed"]

Array = Any


def concrete(*arrays: Array) -> bool:
    """Whether all are arrays with values, on one and the same CPU device."""
    devices = set()
    for array in arrays:
        if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
            return False
        devices.update(array.sharding.device_set)
        if len(devices) != 1:
            return False
    return next(iter(devices)).platform == "cpu"


def check_values(op: str, qw: QuantizedTensor) -> None:
    """TypeError where the weight says what it is like alone, to be traced with."""
    if isinstance(qw.packed, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{op}: the weight ({qw.scheme}, shape {qw.shape}) is made of jax.ShapeDtypeStruct, which have no values; "
            "pass it as an argument to jax.eval_shape or to jax.jit(...).lower, whose function then calls this"
        )


def viewed(qw: QuantizedTensor) -> QuantizedTensor:
    """The tensor over NumPy's views of its arrays."""
    leaves, rebuild = qw.flatten()
    return rebuild([np.asarray(leaf) for leaf in leaves])


def like(values: np.ndarray[Any, Any], operand: Array) -> Array:
    """JAX's array with these values, on the device of an operand.

    It takes memory that begins with a cache line as it is; else it may copy in threads, which a forked process lacks.
    """
    (device,) = operand.sharding.device_set
    return from_numpy(aligned(values), device if getattr(operand, "committed", True) else None)


def from_numpy(values: np.ndarray[Any, Any], device: Any) -> Array:
    """JAX's array with these values, on a device or under a sharding; None for the default device."""
    return jax.device_put(values.astype(values.dtype.newbyteorder("="), copy=False), device)
