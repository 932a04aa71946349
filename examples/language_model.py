"""A Llama language model read from a GGUF file: sizes, packed weights and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import quantcore

from .gguf_tokenizer import GgufTokenizer
from .llama import Array, Cache, Config, Weights, forward
from .merging import merge_layer


class ModelError(ValueError):
    """A file that doesn't hold a Llama decoder."""


@dataclass(frozen=True)
class LanguageModel:
    """A decoder whose weights belong to one array library."""

    config: Config
    tokenizer: GgufTokenizer
    weights: Weights
    library: str = "numpy"

    @classmethod
    def load(cls, file: Path, library: str = "numpy") -> LanguageModel:
        """Read a GGUF file, its weights staying packed."""
        checkpoint = quantcore.load(file)
        config = read_config(checkpoint.metadata)
        tokenizer = GgufTokenizer(checkpoint.metadata)
        for name, shape in weight_shapes(config).items():
            if name not in checkpoint:
                raise ModelError(f"{file} holds no {name}")
            if checkpoint.entries[name].shape != shape:
                raise ModelError(f"{name} in {file} has the shape {checkpoint.entries[name].shape}, not {shape}")
        names = [*weight_shapes(config), *(["output.weight"] if "output.weight" in checkpoint else [])]
        weights = {name: _to(checkpoint[name], library) for name in names if not name.startswith("blk.")}
        for layer in range(config.layers):
            own = [name for name in names if name.startswith(f"blk.{layer}.")]
            weights |= {name: _to(checkpoint[name], library) for name in own}
            merge_layer(weights, layer)  # now, lest all parts be in memory beside what they are merged into
        return cls(config, tokenizer, weights, library)

    def dequantize(self) -> LanguageModel:
        """Return the model with every weight dense, in float32."""
        dense = {name: quantcore.dequantize(weight, dtype="float32") for name, weight in self.weights.items()}
        return replace(self, weights=dense)

    def logits(self, ids: list[int], cache: Cache, last_only: bool = True) -> np.ndarray[Any, Any]:
        """Feed tokens that follow the cache's, which grows by them; the logits are a NumPy array in any library."""
        tokens: Array = quantcore.to_library(np.asarray(ids, dtype=np.int32), self.library)
        found = forward(self.weights, self.config, tokens, cache, self.library, last_only)
        return np.asarray(quantcore.to_library(found, "numpy"), dtype=np.float32)


def read_config(metadata: Mapping[str, Any]) -> Config:
    """Read the sizes of the model from GGUF's key-values."""
    if metadata.get("general.architecture") != "llama":
        raise ModelError(f"the architecture must be llama, not {metadata.get('general.architecture')!r}")
    try:
        config = Config(
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            width=int(metadata["llama.embedding_length"]),
            inner_width=int(metadata["llama.feed_forward_length"]),
            layers=int(metadata["llama.block_count"]),
            heads=int(metadata["llama.attention.head_count"]),
            kv_heads=int(metadata["llama.attention.head_count_kv"]),
            context_length=int(metadata["llama.context_length"]),
            rope_base=float(metadata["llama.rope.freq_base"]),
            norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the file's sizes are missing or malformed: {error}") from error
    if min(config.heads, config.kv_heads, config.layers) < 1 or config.heads % config.kv_heads:
        raise ModelError(f"{config.heads} heads can't share {config.kv_heads} key and value heads")
    if config.width % (2 * config.heads):
        raise ModelError(f"the width {config.width} doesn't split into {config.heads} heads of an even size")
    return config


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every weight that the decoder must have."""
    width, inner = config.width, config.inner_width
    kv_width = width // config.heads * config.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "output_norm.weight": (width,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (kv_width, width),
        "attn_v": (kv_width, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    for index in range(config.layers):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _to(weight: Array, library: str) -> Array:
    return weight.to(library) if quantcore.is_quantized(weight) else quantcore.to_library(weight, library)
