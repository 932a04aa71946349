"""The config.json of a GGUF's model: from the file's key-values, and from which tensors there are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings, shortest_decimal
from quantcore.formats.files import malformed, unsupported
from quantcore.formats.huggingface_model import ARCHITECTURES, ATTENTION, LAYER_TENSORS, MLP
from quantcore.formats.huggingface_rope import rope_scaling

__all__ = ["config_of"]


def config_of(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What config.json says of such a model, from the key-values and from which tensors there are."""
    values = Settings(metadata, path, "metadata")
    architecture = ARCHITECTURES[name]
    layers = _length(values, f"{name}.block_count")
    if layers * LAYER_TENSORS > len(entries):
        values.malformed(f"{name}.block_count is {layers}, of {len(entries)} tensors")
    width, heads = _length(values, f"{name}.embedding_length"), _length(values, f"{name}.attention.head_count")
    theta = shortest_decimal(values.number(f"{name}.rope.freq_base", default=10000.0))
    head_size = _head_size(values, name, width, heads)
    found: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": name,
        "vocab_size": _vocabulary(path, entries),
        "hidden_size": width,
        "intermediate_size": _length(values, f"{name}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _length(values, f"{name}.attention.head_count_kv", default=heads),
        "head_dim": head_size,
        "rms_norm_eps": shortest_decimal(values.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(values, name, entries, head_size, theta),
        "max_position_embeddings": _length(values, f"{name}.context_length"),
        "tie_word_embeddings": "output.weight" not in entries,
    }
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        values.malformed(f"{name}.attention.head_count isn't a multiple of head_count_kv")
    if not values.flag(f"{name}.attention.causal", True):
        unsupported(path, f"{name}.attention.causal is false, mlx-lm's model is causal")
    if name == "llama":
        found["attention_bias"] = any(f"blk.0.{part}.bias" in entries for part in ATTENTION)
        found["mlp_bias"] = any(f"blk.0.{part}.bias" in entries for part in MLP)
    return found | _special_tokens(values, found["vocab_size"])


def _length(values: Settings, key: str, default: int | None = None) -> int:
    if isinstance(values.values.get(key), np.ndarray):
        unsupported(values.file, f"{key} differs from layer to layer, in mlx-lm's model it can't")
    found = values.integer(key, default=default)
    if found < 1:
        values.malformed(f"{key} is {found}")
    return found


def _head_size(values: Settings, name: str, width: int, heads: int) -> int:
    usual = width // heads
    found = _length(values, f"{name}.attention.key_length", default=usual or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = _length(values, f"{name}.{key}", default=found)
        if other != found:
            unsupported(values.file, f"{name}.{key} is {other}, in mlx-lm's model it is the size of a head, {found}")
    if found % 2:
        values.malformed(f"{name}: heads of {found}, which rotary positions can't halve")
    if found * heads != width and not ARCHITECTURES[name].free_head_size:
        unsupported(values.file, f"{heads} heads of {found}; in mlx-lm's {name} they make up the width, {width}")
    return found


def _vocabulary(path: Path, entries: Mapping[str, Entry]) -> int:
    embedding = entries.get("token_embd.weight")
    if embedding is None:
        malformed(path, "the tensor token_embd.weight is missing")
    return embedding.shape[0] if embedding.shape else 0


def _special_tokens(values: Settings, vocabulary: int) -> dict[str, Any]:
    """The ids of the tokens that begin a text and end it; a message may end by another than a text does."""
    ids = {}
    for token in ("bos", "eos", "eot", "eom"):
        key = f"tokenizer.ggml.{token}_token_id"
        if values.values.get(key) is not None:
            ids[token] = values.integer(key)
            if not 0 <= ids[token] < vocabulary:
                values.malformed(f"{key} is {ids[token]}, of {vocabulary} tokens")
    found: dict[str, Any] = {"bos_token_id": ids["bos"]} if "bos" in ids else {}
    ends = list(dict.fromkeys(ids[token] for token in ("eos", "eot", "eom") if token in ids))
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found
