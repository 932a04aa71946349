"""A Llama decoder, written once in array-API code.

Nothing here knows which array library computes, nor whether a weight is dense or quantized: matrix products go
through `quantcore.dot`, embedding rows through `quantcore.take`. Weights have GGUF's names and its layout, in which
rotary positions turn neighbouring pairs of a head's components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from quantcore import array_namespace, dot, take, to_library

Array: TypeAlias = Any
"""An array of any library, or, where a weight is meant, a `quantcore.QuantizedTensor`."""

Weights: TypeAlias = Mapping[str, Array]
"""Weights by GGUF's names, all of one library."""

Cache: TypeAlias = tuple[tuple[Array, Array], ...]
"""Keys and values of each layer, ``(kv_heads, positions, head_size)``; empty before the first token."""

_MASKED_SCORE = -1e9


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama decoder."""

    vocab_size: int
    width: int
    inner_width: int
    layers: int
    heads: int
    kv_heads: int
    context_length: int
    rope_base: float
    norm_eps: float


def forward(
    weights: Weights, config: Config, token_ids: Array, cache: Cache, library: str, last_only: bool = True
) -> tuple[Array, Cache]:
    """Feed tokens that follow those in the cache.

    Parameters
    ----------
    weights
        The weights; any ``(out, in)`` matrix may be quantized.
    config
        The sizes of the model.
    token_ids
        Token ids, int32, of shape ``(length,)``, of the weights' library.
    cache
        What an earlier call returned, or ``()``.
    library
        The name of the weights' library, to which position tables are moved.
    last_only
        Whether only the last token's logits are computed.

    Returns
    -------
    logits : Array
        Shape ``(1, vocab_size)`` or ``(length, vocab_size)``.
    cache : Cache
        The cache with these tokens; the one passed in is left as it was.
    """
    length, start = token_ids.shape[0], (cache[0][0].shape[1] if cache else 0)
    cosines, sines, bias = (to_library(a, library) for a in _position_tables(config, start, length))
    hidden = take(weights["token_embd.weight"], token_ids, axis=0)
    grown = []
    for index in range(config.layers):
        past = cache[index] if cache else None
        hidden, kept = _layer(weights, f"blk.{index}", config, hidden, (cosines, sines), bias, past)
        grown.append(kept)
    if last_only:
        hidden = hidden[-1:, :]
    normed = rms_norm(hidden, weights["output_norm.weight"], config.norm_eps)
    return dot(normed, weights.get("output.weight", weights["token_embd.weight"])), tuple(grown)


def _layer(
    weights: Weights,
    name: str,
    config: Config,
    hidden: Array,
    rotation: tuple[Array, Array],
    bias: Array,
    past: tuple[Array, Array] | None,
) -> tuple[Array, tuple[Array, Array]]:
    normed = rms_norm(hidden, weights[f"{name}.attn_norm.weight"], config.norm_eps)
    attended, kept = _attention(weights, name, config, normed, rotation, bias, past)
    hidden = hidden + attended
    normed = rms_norm(hidden, weights[f"{name}.ffn_norm.weight"], config.norm_eps)
    gated = silu(dot(normed, weights[f"{name}.ffn_gate.weight"])) * dot(normed, weights[f"{name}.ffn_up.weight"])
    return hidden + dot(gated, weights[f"{name}.ffn_down.weight"]), kept


def _attention(
    weights: Weights,
    name: str,
    config: Config,
    x: Array,
    rotation: tuple[Array, Array],
    bias: Array,
    past: tuple[Array, Array] | None,
) -> tuple[Array, tuple[Array, Array]]:
    """Let every token attend to itself and those before it; neighbouring query heads share a key and value head."""
    xp = array_namespace(x)
    length = x.shape[0]
    query = rotate(_split_heads(dot(x, weights[f"{name}.attn_q.weight"]), config.heads), *rotation)
    key = rotate(_split_heads(dot(x, weights[f"{name}.attn_k.weight"]), config.kv_heads), *rotation)
    value = _split_heads(dot(x, weights[f"{name}.attn_v.weight"]), config.kv_heads)
    if past is not None:
        key, value = xp.concat([past[0], key], axis=1), xp.concat([past[1], value], axis=1)
    size, positions = query.shape[-1], key.shape[1]
    grouped = (config.kv_heads, config.heads // config.kv_heads * length, size)
    scores = dot(xp.reshape(query, grouped), key) * (1.0 / math.sqrt(size))
    if length > 1:
        scores = xp.reshape(scores, (config.heads, length, positions)) + bias
        scores = xp.reshape(scores, (*grouped[:2], positions))
    context = xp.reshape(xp.matmul(softmax(scores), value), (config.heads, length, size))
    merged = xp.reshape(xp.permute_dims(context, (1, 0, 2)), (length, config.heads * size))
    return dot(merged, weights[f"{name}.attn_output.weight"]), (key, value)


def _split_heads(x: Array, heads: int) -> Array:
    """``(length, heads * size)`` → ``(heads, length, size)``."""
    xp = array_namespace(x)
    return xp.permute_dims(xp.reshape(x, (x.shape[0], heads, x.shape[1] // heads)), (1, 0, 2))


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Turn each pair of neighbouring components by its position's angle.

    The first of all pairs come first in the result, then the second: products of queries with keys don't depend on
    the order, as long as both have the same.
    """
    xp = array_namespace(x)
    pairs = xp.reshape(x, (*x.shape[:-1], x.shape[-1] // 2, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return xp.concat([first * cosines - second * sines, first * sines + second * cosines], axis=-1)


def _position_tables(config: Config, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines and sines ``(length, head_size / 2)``, and the score bias ``(length, start + length)``."""
    size = config.width // config.heads
    positions = np.arange(start, start + length)
    angles = positions[:, None] * config.rope_base ** (-np.arange(0, size, 2) / size)
    later = np.arange(start + length) > positions[:, None]
    bias = np.where(later, np.float32(_MASKED_SCORE), np.float32(0))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), bias


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Give every row a root mean square of 1, then the learned scale."""
    xp = array_namespace(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``, through tanh, which doesn't overflow."""
    xp = array_namespace(x)
    return 0.5 * x * (1.0 + xp.tanh(0.5 * x))


def softmax(scores: Array) -> Array:
    """Turn every row of scores into weights that sum to 1."""
    xp = array_namespace(scores)
    exponentials = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return exponentials / xp.sum(exponentials, axis=-1, keepdims=True)
