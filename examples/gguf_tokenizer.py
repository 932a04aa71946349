"""The tokenizer that travels inside a GGUF file, built with the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_CONTROL = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


class TokenizerError(ValueError):
    """The file's tokenizer is missing, malformed, or of another kind."""


class GgufTokenizer:
    """Byte-level BPE that splits digits one by one, and the ChatML template.

    Text never turns into control tokens, whatever it spells: only the template places them.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise TokenizerError(f"the tokenizer must be gpt2 with the pre-tokenizer smollm, not {kind}")
        try:
            tokens = list(metadata["tokenizer.ggml.tokens"])
            types = np.asarray(metadata["tokenizer.ggml.token_type"])
            merges = [
                (left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
            ]
            self._start, self._end = tokens.index("<|im_start|>"), tokens.index("<|im_end|>")
            control = [token for token, of in zip(tokens, types, strict=True) if of == _CONTROL]
            bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"the file's tokenizer is malformed: {error}") from error
        self._tokenizer = Tokenizer(bpe)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        self._tokenizer.encode_special_tokens = True
        self.end_ids = frozenset({self._end, *(i for i, token in enumerate(tokens) if token == "<|endoftext|>")})

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, prompt: str) -> list[int]:
        """Return the token ids of a first message to the assistant, up to where it answers."""
        ids = []
        for role, text in (("system", SYSTEM), ("user", prompt)):
            ids += [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]
        return [*ids, self._start, *self.encode("assistant\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without control tokens."""
        return str(self._tokenizer.decode(list(ids)))
