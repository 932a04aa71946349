"""Generate tokens one by one, timed; and measure perplexity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .language_model import LanguageModel
from .llama import Cache

_PREFILL_CHUNK = 256  # tokens fed at once, which bounds the memory that scores take


@dataclass
class Timing:
    """Seconds and tokens of reading the prompt and of writing the answer, filled while tokens are drawn."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)

    @property
    def decode_rate(self) -> float:
        """Tokens a second, by the median token: the first one may wait for kernels to be compiled."""
        return 1 / statistics.median(self.token_seconds)


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that follow the prompt, ending before the model's end of text.

    A temperature of 0 takes the likeliest token each time.
    """
    timing = timing or Timing()
    generator = np.random.default_rng(seed)
    began = time.perf_counter()
    cache: Cache = []
    for start in range(0, len(prompt_ids), _PREFILL_CHUNK):
        logits = model.logits(list(prompt_ids[start : start + _PREFILL_CHUNK]), cache)
    timing.prefill_tokens, timing.prefill_seconds = len(prompt_ids), time.perf_counter() - began
    for count in range(max_tokens):
        token = _draw(logits[-1], temperature, generator)
        if token in model.tokenizer.end_ids:
            return
        yield token
        if count + 1 < max_tokens:
            began = time.perf_counter()
            logits = model.logits([token], cache)
            timing.token_seconds.append(time.perf_counter() - began)


def perplexity(model: LanguageModel, ids: Sequence[int], window: int) -> float:
    """Exponential of the mean negative log-likelihood over whole windows, each read without those before it."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        tokens = list(ids[start : start + window])
        logits = model.logits(tokens[:-1], [], last_only=False).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(window - 1), tokens[1:]]
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return float(np.exp(np.mean(losses)))


def _draw(logits: np.ndarray[Any, Any], temperature: float, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    probabilities = np.exp(scaled)
    return int(generator.choice(len(logits), p=probabilities / probabilities.sum()))
