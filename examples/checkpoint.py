"""A checkpoint folder read into NumPy arrays; its weights quantized, and moved to any array library."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import quantcore

from .minilm import Config, Weights

EMBEDDING_TABLE = "embeddings.word_embeddings.weight"
MAX_LENGTH = 256
"""Tokens that a sentence is cut to where the checkpoint doesn't say: what all-MiniLM-L6-v2 was published with."""


class CheckpointError(ValueError):
    """A folder that doesn't hold a BERT sentence encoder; the message names the file and what is wrong with it."""


def load_config(folder: Path) -> Config:
    """Read the sizes of the model from ``config.json``."""
    found = _read_json(folder / "config.json")
    names = [field.name for field in dataclasses.fields(Config)]
    missing = [name for name in names if not isinstance(found.get(name), int | float)]
    if missing:
        raise CheckpointError(f"{folder / 'config.json'} lacks a number for {', '.join(missing)}")
    return Config(**{name: found[name] for name in names})


def load_weights(folder: Path) -> Weights:
    """Read the encoder's weights from ``model.safetensors`` as float32 NumPy arrays.

    What the encoder doesn't use is left out: the pooler, for one, since a sentence's embedding is the mean of its
    tokens'.
    """
    file = folder / "model.safetensors"
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    weights = {}
    for name, shape in weight_shapes(load_config(folder)).items():
        if name not in found:
            raise CheckpointError(f"{file} holds no {name}: not the checkpoint of such an encoder")
        if found[name].shape != shape:
            raise CheckpointError(f"{name} in {file} has the shape {found[name].shape}, config.json implies {shape}")
        weights[name] = found[name].astype(np.float32, copy=False)
    return weights


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every weight that the encoder uses."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING_TABLE: (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, width),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layer.{index}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        projections = dict.fromkeys(("self.query", "self.key", "self.value", "output.dense"), (width, width))
        linears = {f"attention.{name}": shape for name, shape in projections.items()}
        linears |= {"intermediate.dense": (inner, width), "output.dense": (width, inner)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json``, and have it cut and pad each batch as the sentence encoder was trained to see it."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception, whatever is wrong with the file
        raise CheckpointError(f"cannot read {file}: {error}") from error
    tokenizer.enable_truncation(_max_length(folder))
    tokenizer.enable_padding()
    return tokenizer


def quantize_weights(weights: Weights, bits: int, group_size: int | None, backend: str | None = None) -> Weights:
    """Quantize the matrices and the word-embedding table; leave what is small or added dense.

    Parameters
    ----------
    weights
        Dense weights by their checkpoint names.
    bits
        Bits of a code: 1, 2, 3, 4, 5, 6 or 8.
    group_size
        Weights that share a scale and a bias; None for one group a row. A row that it doesn't divide is padded.
    backend
        The backend that quantizes; by default the one that the arrays' library leads to.
    """
    scheme = quantcore.Scheme("affine", bits, group_size)
    return {
        name: quantcore.quantize(weight, scheme, pad=True, backend=backend) if is_matrix(name) else weight
        for name, weight in weights.items()
    }


def to_library(weights: Weights, library: str) -> Weights:
    """Move every weight to another array library, packed ones staying packed."""
    return {
        name: weight.to(library) if quantcore.is_quantized(weight) else quantcore.to_library(weight, library)
        for name, weight in weights.items()
    }


def is_matrix(name: str) -> bool:
    """Tell whether a weight is the table or a matrix that the model multiplies by, going by its checkpoint name."""
    return name == EMBEDDING_TABLE or (
        name.startswith("encoder.") and name.endswith(".weight") and "LayerNorm" not in name
    )


def size_in_bytes(weights: Weights) -> int:
    """Bytes that the weights take, packed or dense."""
    return sum(int(weight.nbytes) for weight in weights.values())


def parameter_count(weights: Weights) -> int:
    """Numbers that the weights stand for."""
    total = 0
    for weight in weights.values():
        count = 1
        for size in weight.shape:
            count *= int(size)
        total += count
    return total


def _max_length(folder: Path) -> int:
    file = folder / "sentence_bert_config.json"
    if not file.exists():
        return MAX_LENGTH
    return int(_read_json(file).get("max_seq_length", MAX_LENGTH))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return found
