"""Affine codes from groups of weights and weights from affine codes, in array-API code."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from quantcore_backends.array_api_backend.bitstream import constant

__all__ = ["decode_codes", "encode_groups"]

Array = Any


def encode_groups(w: Array, bits: int) -> tuple[Array, Array, Array]:
    """Codes, scales and biases of groups, bit-equal to the CPU kernel of MLX 0.32.

    Parameters
    ----------
    w : array, shape (..., G, group), float32
    bits : int

    Returns
    -------
    codes : array, shape (..., G, group), float32
    scales, biases : array, shape (..., G), float32
    """
    xp = array_namespace(w)
    top = float((1 << bits) - 1)
    scale, bias = _scale_and_bias(xp.min(w, axis=-1, keepdims=True), xp.max(w, axis=-1, keepdims=True), top)
    codes = xp.clip(xp.round((w - bias) / scale), 0.0, top)
    return codes, scale[..., 0], bias[..., 0]


def _scale_and_bias(low: Array, high: Array, top: float) -> tuple[Array, Array]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    xp = array_namespace(low)
    smallest = constant(np.asarray([1e-7], np.float32), low)
    scale = (high - low) / top
    scale = xp.where(scale > smallest, scale, smallest)
    if top == 1:
        return scale, low  # one bit: the two ends
    from_low = xp.abs(low) > xp.abs(high)
    scale = xp.where(from_low, scale, -scale)
    edge = xp.where(from_low, low, high)
    steps = xp.round(edge / scale)
    moved = steps != 0
    scale = xp.where(moved, edge / xp.where(moved, steps, xp.ones_like(steps)), scale)
    return scale, xp.where(moved, edge, xp.zeros_like(edge))


def decode_codes(codes: Array, scales: Array, biases: Array, dtype: Any) -> Array:
    """``code * scale + bias``, each rounded to `dtype`."""
    xp = array_namespace(codes)
    return xp.astype(codes, dtype) * xp.astype(scales, dtype) + xp.astype(biases, dtype)
