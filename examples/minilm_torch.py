"""all-MiniLM-L6-v2 as a ``torch.nn.Module``: dense layers of torch's own, for ``quantcore.torch.quantize_module``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .minilm import Config

__all__ = ["RULES", "SentenceEncoder"]

Tensor = torch.Tensor

RULES = {"embeddings.position_embeddings": None, "embeddings.token_type_embeddings": None, "*": "affine-int4-g64"}
"""What the demo quantizes: the matrices and the word-embedding table."""


class SentenceEncoder(nn.Module):
    """A BERT encoder with mean pooling; its state_dict has the checkpoint's names.

    Parameters
    ----------
    config
        The sizes of the model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})

    @classmethod
    def from_weights(cls, config: Config, weights: Mapping[str, Any]) -> SentenceEncoder:
        """Build the model from a checkpoint's float32 weights, NumPy arrays by name, and put it into eval mode."""
        with torch.device("meta"):
            self = cls(config)
        self.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, assign=True)
        return self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed a batch of tokenized sentences: ids and mask (batch, length) → unit vectors (batch, hidden_size)."""
        hidden = self.embeddings(input_ids)
        visible = attention_mask[:, None, None, :].bool()
        layers: Any = self.encoder["layer"]
        for layer in layers:
            hidden = layer(hidden, visible)
        mask = attention_mask[:, :, None]
        return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (batch, length) → (batch, length, hidden_size)."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        summed = self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        normalised: Tensor = self.LayerNorm(summed)
        return normalised


class Layer(nn.Module):
    """Self-attention and the feed-forward network, each added to its input and normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": _output(width, width, config.layer_norm_eps),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _output(inner, width, config.layer_norm_eps)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """Hidden states (batch, length, hidden_size), and which tokens may be attended to (batch, 1, 1, length)."""
        projections: Any = self.attention["self"]
        query, key, value = (
            projections[name](hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        hidden = _added(self.attention["output"], context.transpose(1, 2).flatten(-2), hidden)
        return _added(self.output, functional.gelu(self.intermediate["dense"](hidden)), hidden)


def _output(inner: int, width: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})


def _added(output: Any, x: Tensor, residual: Tensor) -> Tensor:
    normalised: Tensor = output["LayerNorm"](residual + output["dense"](x))
    return normalised
