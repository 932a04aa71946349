"""The tokenizer inside a GGUF file, written as the files that Hugging Face's libraries and mlx-lm read.

Byte-level BPE (GGUF's kind ``gpt2``), built by the library ``tokenizers`` as the models' own tokenizer.json has it.
How text is split before it is merged is only named in the file; what a name means is in llama.cpp's
src/llama-vocab.cpp, to which the tests hold what is here.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from quantcore.errors import FormatError, UnsupportedError
from quantcore.formats.config import Settings
from quantcore.formats.files import unsupported
from quantcore.formats.gguf import Strings

__all__ = ["write_tokenizer"]

_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

_DIGITS: Final = "smollm"
_BYTES_ONLY: Final = "gpt-2"
_PATTERNS: Final = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
_WHOLE_WORDS: Final = "llama-bpe"
"""Takes a word that is a token without merging, and begins texts with BOS unless told not to."""


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, where there is one, ``chat_template.jinja``.

    Raises
    ------
    UnsupportedError
        If the file has no tokenizer, one of another kind, or the library ``tokenizers`` isn't installed.
    FormatError
        If it is malformed.
    """
    values = Settings(metadata, path, "metadata")
    kind, pre = (values.text(f"tokenizer.ggml.{key}", default="none") for key in ("model", "pre"))
    if kind != "gpt2" or pre not in (_DIGITS, _BYTES_ONLY, *_PATTERNS):
        unsupported(path, f"its tokenizer is of kind {kind[:40]!r}, pre-tokenizer {pre[:40]!r}")
    if find_spec("tokenizers") is None:
        raise UnsupportedError("the library tokenizers isn't installed: pip install tokenizers")
    tokens = _strings(values, "tokens")
    config = _config(values, tokens)
    template = values.text("tokenizer.chat_template", default="")
    try:
        built = _build(values, pre, tokens, config.get("bos_token"))
        files = {
            "tokenizer.json": built.to_str(pretty=True).encode(),
            "tokenizer_config.json": f"{json.dumps(config, indent=4, ensure_ascii=False)}\n".encode(),
        }
        if template:
            files["chat_template.jinja"] = template.encode()
    except FormatError:
        raise
    except Exception as error:  # the library raises bare Exception
        _malformed(values, str(error)[:200])
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _build(values: Settings, pre: str, tokens: list[str], bos: str | None) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merges = [(left, right) for left, right in (merge.split(" ") for merge in _strings(values, "merges"))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == _WHOLE_WORDS))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    steps: list[Any] = [to_bytes]
    if pre in _PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"))
    elif pre == _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    types = values.values.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        _malformed(values, "there isn't a type for each token")
    typed = list(zip(tokens, types.tolist(), strict=True))
    special = [token for token, of in typed if of in (_UNKNOWN, _CONTROL)]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    built.add_tokens([AddedToken(token, normalized=False) for token, of in typed if of == _USER_DEFINED])
    if built.get_vocab_size() != len(vocabulary) or len(vocabulary) != len(tokens):
        _malformed(values, "a token occurs twice")
    if bos is not None and values.flag("tokenizer.ggml.add_bos_token", pre == _WHOLE_WORDS):
        number = vocabulary[bos]
        built.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, number)]
        )
    return built


def _config(values: Settings, tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json says: the tokens of a special meaning."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        name = f"tokenizer.ggml.{key}_token_id"
        if values.values.get(name) is not None:
            number = values.integer(name)
            if not 0 <= number < len(tokens):
                values.malformed(f"{name} is {number}, of {len(tokens)} tokens")
            found[f"{role}_token"] = tokens[number]
    return found


def _strings(values: Settings, key: str) -> list[str]:
    found = values.values.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, Strings):
        _malformed(values, f"tokenizer.ggml.{key} isn't a list of strings")
    return list(found)


def _malformed(values: Settings, what: str) -> NoReturn:
    values.malformed(f"the tokenizer is malformed: {what}")
