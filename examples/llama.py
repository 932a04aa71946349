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

Cache: TypeAlias = list[tuple[Array, Array]]
"""Keys and values of each layer, ``(kv_heads, positions, head_size)``; empty before the first token."""

ATTENTION_IN = ("attn_q", "attn_k", "attn_v")
FFN_IN = ("ffn_gate", "ffn_up")
"""Weights of a layer that multiply the same x."""

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
) -> Array:
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
        What earlier calls left there. It grows by these tokens, layer by layer, so that it is never there twice; its
        arrays aren't written to, and ``list(cache)`` keeps it as it is.
    library
        The name of the weights' library, to which position tables are moved.
    last_only
        Whether only the last token's logits are computed.

    Returns
    -------
    logits : Array
        Shape ``(1, vocab_size)`` or ``(length, vocab_size)``.
    """
    length, start = token_ids.shape[0], (cache[0][0].shape[1] if cache else 0)
    turns, bias = (to_library(a, library) for a in _position_tables(config, start, length))
    hidden = take(weights["token_embd.weight"], token_ids, axis=0)
    for index in range(config.layers):
        past = cache[index] if index < len(cache) else None
        hidden, kept = _layer(weights, f"blk.{index}", config, hidden, turns, bias, past)
        cache[index : index + 1] = [kept]
    if last_only:
        hidden = hidden[-1:, :]
    normed = rms_norm(hidden, weights["output_norm.weight"], config.norm_eps)
    return dot(normed, weights.get("output.weight", weights["token_embd.weight"]))


def _layer(
    weights: Weights,
    name: str,
    config: Config,
    hidden: Array,
    turns: Array,
    bias: Array,
    past: tuple[Array, Array] | None,
) -> tuple[Array, tuple[Array, Array]]:
    normed = rms_norm(hidden, weights[f"{name}.attn_norm.weight"], config.norm_eps)
    attended, kept = _attention(weights, name, config, normed, turns, bias, past)
    hidden = hidden + attended
    normed = rms_norm(hidden, weights[f"{name}.ffn_norm.weight"], config.norm_eps)
    both = project(weights, name, FFN_IN, normed)
    gated = silu(both[:, : config.inner_width]) * both[:, config.inner_width :]
    return hidden + dot(gated, weights[f"{name}.ffn_down.weight"]), kept


def _attention(
    weights: Weights,
    name: str,
    config: Config,
    x: Array,
    turns: Array,
    bias: Array,
    past: tuple[Array, Array] | None,
) -> tuple[Array, tuple[Array, Array]]:
    """Let every token attend to itself and those before it; neighbouring query heads share a key and value head."""
    xp = array_namespace(x)
    length, size = x.shape[0], config.width // config.heads
    heads, turned = config.heads, config.heads + config.kv_heads
    split = xp.reshape(project(weights, name, ATTENTION_IN, x), (length, turned + config.kv_heads, size))
    rotated = _by_head(xp.matmul(split[:, :turned, :], turns))
    query, key, value = rotated[:heads, :, :], rotated[heads:, :, :], _by_head(split[:, turned:, :])
    if past is not None:
        key, value = xp.concat([past[0], key], axis=1), xp.concat([past[1], value], axis=1)
    positions = key.shape[1]
    grouped = (config.kv_heads, heads // config.kv_heads * length, size)
    scores = dot(xp.reshape(query * (1.0 / math.sqrt(size)), grouped), key)
    if length > 1:
        scores = xp.reshape(scores, (heads, length, positions)) + bias
        scores = xp.reshape(scores, (*grouped[:2], positions))
    context = xp.reshape(weighted(value, scores), (heads, length, size))
    merged = xp.reshape(_by_head(context), (length, heads * size))
    return dot(merged, weights[f"{name}.attn_output.weight"]), (key, value)


def project(weights: Weights, name: str, parts: tuple[str, ...], x: Array) -> Array:
    """Multiply x by several weights of a layer, the results side by side: by their merged weight where there is one."""
    whole = weights.get(merged_name(name, parts))
    if whole is not None:
        return dot(x, whole)
    return array_namespace(x).concat([dot(x, weights[f"{name}.{part}.weight"]) for part in parts], axis=-1)


def merged_name(name: str, parts: tuple[str, ...]) -> str:
    """The name of the weight that has the rows of several of a layer."""
    return f"{name}.{'+'.join(parts)}.weight"


def _by_head(x: Array) -> Array:
    """Swap the first two axes: ``(length, heads, size)`` and ``(heads, length, size)``."""
    return array_namespace(x).permute_dims(x, (1, 0, 2))


def _position_tables(config: Config, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that turn a head at each position, and the bias of scores, ``(length, start + length)``.

    A position turns each pair of neighbouring components by an angle of its own: ``head @ matrix``, of shape
    ``(length, head_size, head_size)`` for all, is one operation where the pairs taken apart are ten.
    """
    size = config.width // config.heads
    positions = np.arange(start, start + length)
    angles = positions[:, None] * config.rope_base ** (-np.arange(0, size, 2) / size)
    first, second = np.arange(0, size, 2), np.arange(1, size, 2)
    turns = np.zeros((length, size, size), np.float32)
    turns[:, first, first] = turns[:, second, second] = np.cos(angles)
    turns[:, first, second] = np.sin(angles)
    turns[:, second, first] = -np.sin(angles)
    later = np.arange(start + length) > positions[:, None]
    return turns, np.where(later, np.float32(_MASKED_SCORE), np.float32(0))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Give every row a root mean square of 1, then the learned scale."""
    xp = array_namespace(x)
    return x / xp.sqrt(xp.vecdot(x, x)[..., None] * (1.0 / x.shape[-1]) + eps) * weight


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``, through tanh, which doesn't overflow."""
    half = 0.5 * x
    return half + half * array_namespace(x).tanh(half)


def weighted(values: Array, scores: Array) -> Array:
    """Mean of the values by the softmax of every row of scores, which is divided by its sum after the product."""
    xp = array_namespace(scores)
    exponentials = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return xp.matmul(exponentials, values) / xp.sum(exponentials, axis=-1, keepdims=True)
