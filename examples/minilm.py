"""The BERT encoder all-MiniLM-L6-v2, written once in array-API code.

Nothing here knows which array library computes, nor whether a weight is dense or quantized: matrix products go
through `quantcore.dot`, embedding rows through `quantcore.take`, and everything else is a function of the namespace
that `quantcore.array_namespace` finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from quantcore import array_namespace, dot, take

Array: TypeAlias = Any
"""An array of any library, or, where a weight is meant, a `quantcore.QuantizedTensor`."""

Weights: TypeAlias = Mapping[str, Array]
"""Weights by the names that the checkpoint gives them, all of one library."""

_MASKED_SCORE = -1e9


@dataclass(frozen=True)
class Config:
    """The sizes of a BERT encoder, named as in its ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


def encode(weights: Weights, config: Config, input_ids: Array, attention_mask: Array) -> Array:
    """Embed a batch of tokenized sentences.

    Parameters
    ----------
    weights
        The checkpoint's weights; any ``(out, in)`` matrix may be quantized.
    config
        The sizes of the model.
    input_ids
        Token ids, int32, of shape ``(batch, length)``.
    attention_mask
        1 for a token and 0 for padding, float32, of shape ``(batch, length)``.

    Returns
    -------
    Array
        Unit vectors of shape ``(batch, hidden_size)``, so that their products are cosine similarities.
    """
    hidden = embed_tokens(weights, config, input_ids)
    mask = attention_mask[:, None, None, :]
    score_bias = (1.0 - mask) * _MASKED_SCORE
    for index in range(config.num_hidden_layers):
        hidden = encoder_layer(weights, f"encoder.layer.{index}", config, hidden, score_bias)
    return normalize(mean_pool(hidden, attention_mask))


def embed_tokens(weights: Weights, config: Config, input_ids: Array) -> Array:
    """Sum the word, position and token-type embeddings of every token, and normalise the sum."""
    length = input_ids.shape[1]
    words = take(weights["embeddings.word_embeddings.weight"], input_ids, axis=0)
    positions = weights["embeddings.position_embeddings.weight"][:length, :]
    token_type = weights["embeddings.token_type_embeddings.weight"][0, :]
    return layer_norm(weights, "embeddings.LayerNorm", config, words + positions + token_type)


def encoder_layer(weights: Weights, name: str, config: Config, hidden: Array, score_bias: Array) -> Array:
    """Apply self-attention, then the feed-forward network, each added to its input and normalised."""
    context = self_attention(weights, f"{name}.attention.self", config, hidden, score_bias)
    attended = linear(weights, f"{name}.attention.output.dense", context)
    hidden = layer_norm(weights, f"{name}.attention.output.LayerNorm", config, hidden + attended)
    expanded = gelu(linear(weights, f"{name}.intermediate.dense", hidden))
    contracted = linear(weights, f"{name}.output.dense", expanded)
    return layer_norm(weights, f"{name}.output.LayerNorm", config, hidden + contracted)


def self_attention(weights: Weights, name: str, config: Config, hidden: Array, score_bias: Array) -> Array:
    """Let every token attend to all tokens of its sentence, in each head apart."""
    xp = array_namespace(hidden)
    query = split_heads(linear(weights, f"{name}.query", hidden), config.num_attention_heads)
    key = split_heads(linear(weights, f"{name}.key", hidden), config.num_attention_heads)
    value = split_heads(linear(weights, f"{name}.value", hidden), config.num_attention_heads)
    scale = 1.0 / math.sqrt(query.shape[-1])
    return merge_heads(xp.matmul(softmax(dot(query, key) * scale + score_bias), value))


def split_heads(hidden: Array, heads: int) -> Array:
    """``(batch, length, heads * size)`` → ``(batch, heads, length, size)``."""
    xp = array_namespace(hidden)
    batch, length, width = hidden.shape
    return xp.permute_dims(xp.reshape(hidden, (batch, length, heads, width // heads)), (0, 2, 1, 3))


def merge_heads(context: Array) -> Array:
    """``(batch, heads, length, size)`` → ``(batch, length, heads * size)``."""
    xp = array_namespace(context)
    batch, heads, length, size = context.shape
    return xp.reshape(xp.permute_dims(context, (0, 2, 1, 3)), (batch, length, heads * size))


def linear(weights: Weights, name: str, x: Array) -> Array:
    """Apply a dense layer: ``x @ weight.T + bias``."""
    return dot(x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def layer_norm(weights: Weights, name: str, config: Config, x: Array) -> Array:
    """Give every row mean 0 and variance 1, then the learned scale and shift."""
    xp = array_namespace(x)
    centered = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centered * centered, axis=-1, keepdims=True)
    scaled = centered / xp.sqrt(variance + config.layer_norm_eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(scores: Array) -> Array:
    """Turn every row of scores into weights that sum to 1."""
    xp = array_namespace(scores)
    exponentials = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return exponentials / xp.sum(exponentials, axis=-1, keepdims=True)


def gelu(x: Array) -> Array:
    """Gate x by the normal distribution's cumulative probability: the exact GELU, not its tanh form."""
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


def erf(x: Array) -> Array:
    """Approximate the error function, which the array API lacks, within 1.5e-7.

    References
    ----------
    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), formula 7.1.26.
    """
    xp = array_namespace(x)
    size = xp.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return xp.sign(x) * (1.0 - tail * xp.exp(-size * size))


def mean_pool(hidden: Array, attention_mask: Array) -> Array:
    """Average the tokens of each sentence, leaving out its padding."""
    xp = array_namespace(hidden)
    mask = attention_mask[:, :, None]
    return xp.sum(hidden * mask, axis=1) / xp.sum(mask, axis=1)


def normalize(x: Array) -> Array:
    """Scale every row to length 1."""
    xp = array_namespace(x)
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
