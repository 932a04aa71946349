"""The Llama decoder against a float64 reference, on a small random model; and its cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import quantcore
from quantcore_examples.language_model import weight_shapes
from quantcore_examples.llama import Cache, Config, forward
from quantcore_examples.merging import merge_layer

CONFIG = Config(
    vocab_size=40,
    width=64,
    inner_width=96,
    layers=2,
    heads=4,
    kv_heads=2,
    context_length=32,
    rope_base=1e5,
    norm_eps=1e-5,
)
IDS = [3, 17, 39, 0, 3, 22, 8]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    rng = np.random.default_rng(5)
    shapes = weight_shapes(CONFIG)
    return {name: rng.normal(size=s).astype(np.float32) / s[-1] ** (len(s) - 1.5) for name, s in shapes.items()} | {
        name: rng.uniform(0.5, 1.5, size=s).astype(np.float32) for name, s in shapes.items() if len(s) == 1
    }


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight


def turned(head: Array, position: int) -> Array:
    """Rotate one head's pairs as complex numbers."""
    angles = position * CONFIG.rope_base ** (-np.arange(0, head.size, 2) / head.size)
    return (head[0::2] + 1j * head[1::2]) * np.exp(1j * angles)


def reference(weights: dict[str, Array], ids: list[int]) -> Array:
    """Compute logits in float64, one query head and one position at a time."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    size = CONFIG.width // CONFIG.heads
    hidden = w["token_embd.weight"][ids]
    for layer in range(CONFIG.layers):
        own = {n.split(".")[2]: v for n, v in w.items() if n.startswith(f"blk.{layer}.")}
        x = norm(hidden, own["attn_norm"])
        q, k, v = (x @ own[f"attn_{n}"].T for n in "qkv")
        context = np.zeros_like(q)
        for head in range(CONFIG.heads):
            at = slice(head * size, (head + 1) * size)
            shared = head // (CONFIG.heads // CONFIG.kv_heads)
            kv_at = slice(shared * size, (shared + 1) * size)
            for t in range(len(ids)):
                query = turned(q[t, at], t)
                scores = np.array([(query * turned(k[s, kv_at], s).conj()).real.sum() for s in range(t + 1)])
                share = np.exp(scores / np.sqrt(size))
                context[t, at] = share / share.sum() @ v[: t + 1, kv_at]
        hidden = hidden + context @ own["attn_output"].T
        x = norm(hidden, own["ffn_norm"])
        gate = x @ own["ffn_gate"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ own["ffn_up"].T)) @ own["ffn_down"].T
    return norm(hidden, w["output_norm.weight"]) @ w["token_embd.weight"].T


def moved(weights: dict[str, Any], library: str) -> dict[str, Any]:
    return {
        name: w.to(library) if quantcore.is_quantized(w) else quantcore.to_library(w, library)
        for name, w in weights.items()
    }


def logits(weights: dict[str, Any], pieces: list[list[int]], library: str) -> Array:
    """Logits of all tokens, fed piece by piece."""
    own = moved(weights, library)
    cache: Cache = []
    found = []
    for piece in pieces:
        tokens = quantcore.to_library(np.asarray(piece, np.int32), library)
        part = forward(own, CONFIG, tokens, cache, library, last_only=False)
        found.append(np.asarray(quantcore.to_library(part, "numpy")))
    return np.concatenate(found)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
@pytest.mark.parametrize("pieces", [[IDS], [[i] for i in IDS], [IDS[:3], IDS[3:6], IDS[6:]]])
def test_logits_equal_the_reference_however_tokens_are_fed(
    weights: dict[str, Array], pieces: list[list[int]], library: str
) -> None:
    with quantcore.use_precision("highest"):
        found = logits(weights, pieces, library)
    np.testing.assert_allclose(found, reference(weights, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_packed_weights_give_the_logits_of_the_dequantized(weights: dict[str, Array], library: str) -> None:
    packed = {n: quantcore.quantize(w, bits=4, group_size=32) if w.ndim == 2 else w for n, w in weights.items()}
    dense = {n: np.asarray(quantcore.dequantize(w)) for n, w in packed.items()}
    with quantcore.use_precision("highest"):
        found = logits(packed, [IDS[:4], *([i] for i in IDS[4:])], library)
    np.testing.assert_allclose(found, reference(dense, IDS), rtol=1e-4, atol=1e-4)


def test_only_the_last_logits_are_computed_when_asked_for(weights: dict[str, Array]) -> None:
    cache: Cache = []
    found = forward(weights, CONFIG, np.asarray(IDS, np.int32), cache, "numpy")
    assert found.shape == (1, CONFIG.vocab_size)
    np.testing.assert_allclose(found[0], reference(weights, IDS)[-1], rtol=1e-3, atol=1e-3)
    assert {kept.shape for pair in cache for kept in pair} == {(2, len(IDS), 16)}


def test_a_copy_of_the_cache_stays_as_it_was(weights: dict[str, Array]) -> None:
    cache: Cache = []
    forward(weights, CONFIG, np.asarray(IDS[:4], np.int32), cache, "numpy")
    kept = list(cache)
    first = forward(weights, CONFIG, np.asarray(IDS[4:], np.int32), cache, "numpy")
    assert cache[0][0].shape[1] == len(IDS)
    assert kept[0][0].shape[1] == 4
    np.testing.assert_array_equal(forward(weights, CONFIG, np.asarray(IDS[4:], np.int32), kept, "numpy"), first)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_merged_weights_give_the_same_logits(weights: dict[str, Array], library: str) -> None:
    packed = {n: quantcore.quantize(w, bits=4, group_size=32) if w.ndim == 2 else w for n, w in weights.items()}
    expected = logits(packed, [IDS], library)
    own = moved(packed, library)
    merge_layer(own, 0)
    assert {"blk.0.attn_q+attn_k+attn_v.weight", "blk.0.ffn_gate+ffn_up.weight"} <= own.keys()
    assert "blk.0.attn_q.weight" not in own
    tokens = quantcore.to_library(np.asarray(IDS, np.int32), library)
    found = forward(own, CONFIG, tokens, [], library, last_only=False)
    np.testing.assert_allclose(np.asarray(quantcore.to_library(found, "numpy")), expected, rtol=1e-3, atol=1e-3)


def test_weights_that_are_stored_otherwise_stay_apart(weights: dict[str, Array]) -> None:
    mixed: dict[str, Any] = dict(weights)
    mixed["blk.0.attn_v.weight"] = quantcore.quantize(weights["blk.0.attn_v.weight"], bits=8, group_size=32)
    merge_layer(mixed, 0)
    assert "blk.0.attn_v.weight" in mixed
    assert "blk.0.attn_q+attn_k+attn_v.weight" not in mixed
    assert "blk.0.ffn_gate+ffn_up.weight" in mixed
