"""Affine codes from groups of weights, and codes times scales plus biases, in NumPy."""

from typing import Any, TypeAlias

import numpy as np

__all__ = ["encode_groups", "scale"]

Array: TypeAlias = np.ndarray[Any, Any]


def encode_groups(w: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes, scales and biases of groups, bit-equal to the CPU kernel of MLX 0.32.

    Parameters
    ----------
    w : array, shape (N, G, group), float32
    bits : int

    Returns
    -------
    codes : array, shape (N, G, group), uint8
    scales, biases : array, shape (N, G), float32
    """
    low, high = w.min(axis=-1, keepdims=True), w.max(axis=-1, keepdims=True)
    top = np.float32((1 << bits) - 1)
    scale, bias = _scale_and_bias(low, high, top)
    codes = np.clip(np.rint((w - bias) / scale), 0, top).astype(np.uint8)
    return codes, scale[..., 0], bias[..., 0]


def _scale_and_bias(low: Array, high: Array, top: np.float32) -> tuple[Array, Array]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    if top == 1:
        return scale, low  # one bit: the two ends
    from_low = np.abs(low) > np.abs(high)
    scale = np.where(from_low, scale, -scale)
    edge = np.where(from_low, low, high)
    steps = np.rint(edge / scale)
    moved = steps != 0
    return np.divide(edge, steps, out=scale, where=moved), np.where(moved, edge, np.float32(0))


def scale(codes: Array, scales: Array, biases: Array | None = None) -> Array:
    """In place: the product, then the sum, each rounded, as the contract has it."""
    with np.errstate(over="ignore", invalid="ignore"):
        codes *= scales
        if biases is not None:
            codes += biases
    return codes
