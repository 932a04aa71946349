"""What quantization costs and saves, measured on one backend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import checkpoint
from .minilm import Weights
from .search import Hit, nearest
from .sentence_model import Embeddings, SentenceModel

REFERENCE_SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
REFERENCE_SIMILARITIES = ((0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411))
"""Pairs of the sentences above, and the cosine that the published float32 model gives them."""

TIMED_SENTENCES = 15


@dataclass(frozen=True)
class Evaluation:
    """A quantized model beside its float32 original, on one backend; `backend` says which."""

    backend: str
    embeddings: Embeddings
    hits: tuple[Hit, ...]
    float_scores: tuple[float, ...]
    cosines: Embeddings
    float_seconds: float
    quantized_seconds: float


@dataclass(frozen=True)
class Size:
    """What weights take in memory."""

    bytes: int
    parameters: int

    @classmethod
    def of(cls, weights: Weights) -> Size:
        """Measure weights, dense or packed."""
        return cls(checkpoint.size_in_bytes(weights), checkpoint.parameter_count(weights))

    @property
    def megabytes(self) -> float:
        """Size in MB, 10⁶ bytes each."""
        return self.bytes / 1e6

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each number, scales and biases included."""
        return 8 * self.bytes / self.parameters


def reference_similarities(model: SentenceModel) -> tuple[float, ...]:
    """Return the model's similarities for the pairs of `REFERENCE_SIMILARITIES`."""
    embeddings = model.embed(REFERENCE_SENTENCES)
    return tuple(float(embeddings[i] @ embeddings[j]) for i, j, _ in REFERENCE_SIMILARITIES)


def matches_reference(similarity: float, reference: float) -> bool:
    """Tell whether a similarity is the reference to three decimals."""
    return abs(similarity - reference) < 5e-4


def evaluate(
    backend: str,
    original: SentenceModel,
    quantized: SentenceModel,
    query: str,
    sentences: Sequence[str],
    top: int,
) -> Evaluation:
    """Search with the quantized model, and compare it with the float32 model on the same backend."""
    float_embeddings = original.embed([*sentences, query])
    embeddings = quantized.embed([*sentences, query])
    hits = nearest(embeddings[-1], embeddings[:-1], top)
    return Evaluation(
        backend=backend,
        embeddings=embeddings[:-1],
        hits=hits,
        float_scores=tuple(float(float_embeddings[hit.index] @ float_embeddings[-1]) for hit in hits),
        cosines=np.sum(embeddings[:-1] * float_embeddings[:-1], axis=-1),
        float_seconds=median_seconds(original, sentences[:TIMED_SENTENCES]),
        quantized_seconds=median_seconds(quantized, sentences[:TIMED_SENTENCES]),
    )


def median_seconds(model: SentenceModel, sentences: Sequence[str]) -> float:
    """Return the median time of embedding a sentence alone, after one that isn't counted: it compiles kernels."""
    model.embed(sentences[:1])
    return statistics.median(_seconds(model, sentence) for sentence in sentences)


def _seconds(model: SentenceModel, sentence: str) -> float:
    start = time.perf_counter()
    model.embed([sentence])
    return time.perf_counter() - start
