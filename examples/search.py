"""Semantic search over unit vectors: the nearest are those with the largest product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sentence_model import Embeddings


@dataclass(frozen=True)
class Hit:
    """A sentence found, by its position, with its cosine similarity to the query."""

    index: int
    score: float


def nearest(query: Embeddings, embeddings: Embeddings, top: int) -> tuple[Hit, ...]:
    """Return the `top` rows of `embeddings` that lie nearest to `query`, the best first."""
    scores = embeddings @ query
    order = np.argsort(-scores, kind="stable")[:top]
    return tuple(Hit(int(index), float(scores[index])) for index in order)
