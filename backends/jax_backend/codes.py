"""Codes to and from bitstreams and floats in ``jax.numpy``, for traced arrays on any device."""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from quantcore import Scheme

__all__ = ["decode", "encode", "origin", "pack", "unpack"]

Array = Any

_WORD: Final = 32


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row.

    Parameters
    ----------
    packed : array, shape (..., W), uint32
    bits : int
    count : int

    Returns
    -------
    array, shape (..., count), uint32
    """
    mask = jnp.uint32((1 << bits) - 1)
    *leading, words = packed.shape
    if _WORD % bits == 0:
        shifts = jnp.asarray(np.arange(0, _WORD, bits, dtype=np.uint32))
        codes = (packed[..., None] >> shifts) & mask
        return codes.reshape(*leading, words * (_WORD // bits))[..., :count]
    first, shift, crosses = _positions(bits)
    blocks = -(-words // bits)
    packed = jnp.pad(packed, [(0, 0)] * len(leading) + [(0, blocks * bits - words)])
    packed = packed.reshape(*leading, blocks, bits)
    low = packed[..., first] >> shift
    high = packed[..., np.minimum(first + 1, bits - 1)] << np.where(crosses, _WORD - shift, 0).astype(np.uint32)
    codes = (low | jnp.where(crosses, high, jnp.uint32(0))) & mask
    return codes.reshape(*leading, blocks * _WORD)[..., :count]


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes : array, shape (..., K), uint32
        Each below ``2**bits``.
    bits : int

    Returns
    -------
    array, shape (..., ceil(K * bits / 32)), uint32
    """
    *leading, count = codes.shape
    blocks = -(-count // _WORD)
    codes = jnp.pad(codes, [(0, 0)] * len(leading) + [(0, blocks * _WORD - count)])
    codes = codes.reshape(*leading, blocks, _WORD)
    first, shift, crosses = _positions(bits)
    low = codes << shift
    high = codes >> np.where(crosses, _WORD - shift, 0).astype(np.uint32)
    words = []
    for word in range(bits):
        value = low[..., first == word].sum(-1, dtype=jnp.uint32)
        spilled = np.flatnonzero(crosses & (first + 1 == word))
        words.append(value + high[..., int(spilled[0])] if spilled.size else value)
    packed = jnp.stack(words, axis=-1).reshape(*leading, blocks * bits)
    return packed[..., : -(-count * bits // _WORD)]


def _positions(bits: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of each of 32 codes: the word in which it starts, at which bit, and whether it goes on in the next one."""
    start = np.arange(_WORD) * bits
    first, shift = start // _WORD, (start % _WORD).astype(np.uint32)
    return first, shift, shift + bits > _WORD


def decode(packed: Array, scales: Array, biases: Array, scheme: Scheme, columns: int, dtype: Any = np.float32) -> Array:
    """Dense rows, ``code * scale + bias``; XLA may contract the two into one rounding.

    Parameters
    ----------
    packed, scales, biases : array, shape (..., *)
    scheme : Scheme
    columns : int
    dtype : dtype
        float32 or float64, to compute in.

    Returns
    -------
    array, shape (..., columns)
    """
    codes = unpack(packed, scheme.bits, columns).astype(dtype)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    group = scheme.group_size
    if group is None:
        return codes * scales + biases
    leading, groups = codes.shape[:-1], scales.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * len(leading) + [(0, groups * group - columns)])
    dense = codes.reshape(*leading, groups, group) * scales[..., None] + biases[..., None]
    return dense.reshape(*leading, groups * group)[..., :columns]


def origin(scales: Array, biases: Array, bits: int) -> Array:
    """The code that stands nearest to 0."""
    top = (1 << bits) - 1
    nearest = jnp.rint(-biases / scales)
    return jnp.where(nearest > 0, jnp.minimum(nearest, top), 0)  # 0 for NaN as well


def encode(w: Array, scheme: Scheme) -> tuple[Array, Array, Array]:
    """Quantize along the last axis, by the encoder of MLX 0.32's CPU kernel.

    Parameters
    ----------
    w : array, shape (..., N, K), float16, bfloat16 or float32
    scheme : Scheme

    Returns
    -------
    packed : array, shape scheme.packed_shape(w.shape), uint32
    scales, biases : array, shape scheme.scales_shape(w.shape), w's dtype
    """
    *leading, columns = w.shape
    groups = scheme.groups(columns)
    group = scheme.group_size or columns
    missing = groups * group - columns
    dense = w.astype(jnp.float32)
    if missing:
        dense = jnp.concatenate([dense, jnp.broadcast_to(dense[..., -1:], (*leading, missing))], axis=-1)
    dense = dense.reshape(*leading, groups, group)
    # behind a barrier XLA can't turn a division into a product with the reciprocal, which rounds otherwise
    top = jax.lax.optimization_barrier(jnp.float32((1 << scheme.bits) - 1))
    scale, bias = _scale_and_bias(*_ends(dense), top, scheme.bits)
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(scale, dense.shape))
    codes = jnp.clip(jnp.rint((dense - bias) / divisor), 0, top).astype(jnp.uint32)
    packed = pack(codes.reshape(*leading, groups * group)[..., :columns], scheme.bits)
    return packed, scale[..., 0].astype(w.dtype), bias[..., 0].astype(w.dtype)


_MAGNITUDE: Final = np.int32(0x7FFFFFFF)


def _ends(w: Array) -> tuple[Array, Array]:
    """Least and greatest of each group; found among the bits as integers, since XLA's CPU takes subnormals for 0."""
    bits = jax.lax.bitcast_convert_type(w, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ _MAGNITUDE, bits)
    ends = ordered.min(-1, keepdims=True), ordered.max(-1, keepdims=True)
    low, high = (jax.lax.bitcast_convert_type(jnp.where(end < 0, end ^ _MAGNITUDE, end), jnp.float32) for end in ends)
    return low, high


def _magnitude(w: Array) -> Array:
    """Bits of the absolute value, which are ordered as it is."""
    return jax.lax.bitcast_convert_type(w, jnp.int32) & _MAGNITUDE


def _scale_and_bias(low: Array, high: Array, top: Array, bits: int) -> tuple[Array, Array]:
    """Scale and bias of groups from `low` to `high`: the edge of larger magnitude, and zero, become codes."""
    scale = jnp.maximum((high - low) / top, jnp.float32(1e-7))
    if bits == 1:
        return scale, low  # the two ends
    from_low = _magnitude(low) > _magnitude(high)
    scale = jnp.where(from_low, scale, -scale)
    edge = jnp.where(from_low, low, high)
    steps = jnp.rint(edge / scale)
    moved = steps != 0
    return jnp.where(moved, edge / jnp.where(moved, steps, 1), scale), jnp.where(moved, edge, 0)
