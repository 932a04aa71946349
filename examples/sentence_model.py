"""Sentences in, embeddings out: the tokenizer and the encoder joined, on one array library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

import quantcore

from . import checkpoint
from .minilm import Config, Weights, encode

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SentenceModel:
    """A sentence encoder whose weights are arrays, dense or quantized, of one library.

    Parameters
    ----------
    config
        The sizes of the encoder.
    tokenizer
        Cuts text to token ids; pads a batch to its longest sentence.
    weights
        The checkpoint's weights, by name.
    library
        The array library that the weights belong to: ``"numpy"``, ``"mlx"``, ...
    """

    config: Config
    tokenizer: Tokenizer
    weights: Weights
    library: str = "numpy"

    @classmethod
    def load(cls, folder: Path) -> SentenceModel:
        """Read a checkpoint folder into NumPy arrays."""
        return cls(checkpoint.load_config(folder), checkpoint.load_tokenizer(folder), checkpoint.load_weights(folder))

    def quantize(self, bits: int, group_size: int | None, backend: str | None = None) -> SentenceModel:
        """Return the model with its matrices and its word-embedding table quantized."""
        return replace(self, weights=checkpoint.quantize_weights(self.weights, bits, group_size, backend))

    def to(self, library: str) -> SentenceModel:
        """Return the model with every weight moved to an array library."""
        return replace(self, weights=checkpoint.to_library(self.weights, library), library=library)

    def embed(self, sentences: Sequence[str]) -> Embeddings:
        """Embed sentences as one batch; the result is a NumPy array, whatever library computed it."""
        input_ids, attention_mask = (quantcore.to_library(a, self.library) for a in self.tokenize(sentences))
        embeddings = encode(self.weights, self.config, input_ids, attention_mask)
        return np.asarray(quantcore.to_library(embeddings, "numpy"), dtype=np.float32)

    def tokenize(self, sentences: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the token ids and the attention mask of a batch, both ``(batch, length)``."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        input_ids = np.asarray([encoding.ids for encoding in encodings], dtype=np.int32)
        attention_mask = np.asarray([encoding.attention_mask for encoding in encodings], dtype=np.float32)
        return input_ids, attention_mask
