"""A GGUF's model as Hugging Face and mlx-lm have it: the names of its tensors, the order of their rows, its config.

What llama.cpp's converter (conversion/llama.py and qwen.py) did to a model is undone: tensors get their names back; for
the architecture llama the rows of q and k, which it orders for rotary positions of neighbouring components, their
order. That moves whole rows and changes none, so that packed weights stay packed.

A model is only translated as a whole. mlx-lm's class must have a place for every tensor and every tensor that it needs
must be there; what it can't compute as llama.cpp does is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from quantcore.errors import UnsupportedError
from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings
from quantcore.formats.files import Array, malformed
from quantcore.tensor import QuantizedTensor

__all__ = ["ARCHITECTURES", "Tensor", "tensors_of", "translated"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How an architecture of GGUF differs from the others.

    Parameters
    ----------
    model_class : str
        Hugging Face's class.
    reordered : bool
        Whether the rows of q and k are in GGUF's order.
    free_head_size : bool
        Whether the size of a head may be another than the width divided by the heads.
    biased : tuple of str
        Weights of a layer that have a bias.
    normed_heads : bool
        Whether each head of q and k is normalized.
    """

    model_class: str
    reordered: bool = False
    free_head_size: bool = True
    biased: tuple[str, ...] = ()
    normed_heads: bool = False


ARCHITECTURES: Final = {
    "llama": Architecture("LlamaForCausalLM", reordered=True),
    "qwen2": Architecture("Qwen2ForCausalLM", free_head_size=False, biased=("attn_q", "attn_k", "attn_v")),
    "qwen3": Architecture("Qwen3ForCausalLM", normed_heads=True),
}

_ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP: Final = ("ffn_gate", "ffn_up", "ffn_down")

_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_LAYER_TENSORS: Final = 9
"""What a layer has at least, so that no more layers are looked for than there can be."""

_ROPE_FREQS: Final = "rope_freqs.weight"
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all of Llama 3.1, 3.2 and 3.3 have; only their factors differ."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that a model must have.

    Parameters
    ----------
    name : str
        Hugging Face's.
    shape : tuple of int
    heads : int
        Where its rows are in GGUF's order, of how many heads they are; else 0.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def translated(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries under Hugging Face's names, their rows in its order, and the model's config.

    Raises
    ------
    UnsupportedError
        If the architecture isn't known, or mlx-lm's model can't compute what the file says.
    FormatError
        If a key is missing or has the wrong type, or tensors are missing or of another shape than the keys say.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: Hugging Face's names for the architecture {str(name)[:40]!r} aren't known here, only those for "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = _config(path, entries, metadata, name)
    expected = tensors_of(config, ARCHITECTURES[name])
    _check(path, entries, expected, name)
    found = {}
    for own, entry in entries.items():
        if own != _ROPE_FREQS:
            tensor = expected[own]
            found[tensor.name] = _reordered(entry, tensor.heads) if tensor.heads else entry
    return found, config


# --- tensors --------------------------------------------------------------------------------------------------


def tensors_of(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor]:
    """What tensors the model of a config has, by GGUF's names."""
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (heads * size, width),
        "attn_k": (kv_heads * size, width),
        "attn_v": (kv_heads * size, width),
        "attn_output": (width, heads * size),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    if architecture.normed_heads:
        shapes |= {"attn_q_norm": (size,), "attn_k_norm": (size,)}
    biased = set(architecture.biased)
    biased.update(_ATTENTION if config.get("attention_bias") else (), _MLP if config.get("mlp_bias") else ())
    order = {"attn_q": heads, "attn_k": kv_heads} if architecture.reordered else {}
    embedding = (config["vocab_size"], width)
    found = {"token_embd.weight": Tensor("model.embed_tokens.weight", embedding)}
    for layer in range(config["num_hidden_layers"]):
        for part, shape in shapes.items():
            own, new = f"blk.{layer}.{part}", f"model.layers.{layer}.{_LAYER_NAMES[part]}"
            found[f"{own}.weight"] = Tensor(f"{new}.weight", shape, order.get(part, 0))
            if part in biased:
                found[f"{own}.bias"] = Tensor(f"{new}.bias", shape[:1], order.get(part, 0))
    found["output_norm.weight"] = Tensor("model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        found["output.weight"] = Tensor("lm_head.weight", embedding)
    return found


def _check(path: Path, entries: Mapping[str, Entry], expected: Mapping[str, Tensor], architecture: str) -> None:
    """Raise unless the tensors are just those of the model."""
    for name in entries:
        if name not in expected and name != _ROPE_FREQS:
            _unsupported(path, f"mlx-lm's {architecture} has no place for the tensor {name[:200]!r}")
    for name, tensor in expected.items():
        if name not in entries and name.endswith(".bias"):
            _unsupported(path, f"there is no {name}, and mlx-lm's {architecture} has such biases all or none")
        if name not in entries:
            malformed(path, f"the tensor {name} of a model of {architecture} is missing")
        if entries[name].shape != tensor.shape:
            malformed(path, f"its shape is {entries[name].shape}, the file's keys make it {tensor.shape}", tensor=name)


def _reordered(entry: Entry, heads: int) -> Entry:
    """The entry of a tensor of q or k whose rows are put back from GGUF's order.

    There the first half of a head's components alternates with the second.
    """

    def read() -> Any:
        tensor = entry.read()
        rows = np.arange(entry.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        if not isinstance(tensor, QuantizedTensor):
            return tensor[rows]
        leaves, rebuild = tensor.flatten()
        return rebuild([leaf[rows] for leaf in leaves])

    return replace(entry, read=read)


# --- the config -----------------------------------------------------------------------------------------------


def _config(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What config.json says of such a model, from the key-values and from which tensors there are."""
    values = Settings(metadata, path, "metadata")
    architecture = ARCHITECTURES[name]
    layers = _length(values, f"{name}.block_count")
    if layers * _LAYER_TENSORS > len(entries):
        values.malformed(f"{name}.block_count is {layers}, of {len(entries)} tensors")
    width, heads = _length(values, f"{name}.embedding_length"), _length(values, f"{name}.attention.head_count")
    theta = _shortest(values.number(f"{name}.rope.freq_base", default=10000.0))
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
        "rms_norm_eps": _shortest(values.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(values, name, entries, head_size, theta),
        "max_position_embeddings": _length(values, f"{name}.context_length"),
        "tie_word_embeddings": "output.weight" not in entries,
    }
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        values.malformed(f"{name}.attention.head_count isn't a multiple of head_count_kv")
    if not values.flag(f"{name}.attention.causal", True):
        _unsupported(path, f"{name}.attention.causal is false, mlx-lm's model is causal")
    if name == "llama":
        found["attention_bias"] = any(f"blk.0.{part}.bias" in entries for part in _ATTENTION)
        found["mlp_bias"] = any(f"blk.0.{part}.bias" in entries for part in _MLP)
    return found | _special_tokens(values, found["vocab_size"])


def _length(values: Settings, key: str, default: int | None = None) -> int:
    if isinstance(values.values.get(key), np.ndarray):
        _unsupported(values.file, f"{key} differs from layer to layer, in mlx-lm's model it can't")
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
            _unsupported(values.file, f"{name}.{key} is {other}, in mlx-lm's model it is the size of a head, {found}")
    if found % 2:
        values.malformed(f"{name}: heads of {found}, which rotary positions can't halve")
    if found * heads != width and not ARCHITECTURES[name].free_head_size:
        _unsupported(values.file, f"{heads} heads of {found}; in mlx-lm's {name} they make up the width, {width}")
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


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where the file's float32 is 9.999999747378752e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


# --- rotary positions -----------------------------------------------------------------------------------------


def _rope_scaling(
    values: Settings, name: str, entries: Mapping[str, Entry], head_size: int, theta: float
) -> dict[str, Any] | None:
    factors = [key for key in (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear") if key in values.values]
    kind = values.text(f"{name}.rope.scaling.type", default="linear")
    if values.number(f"{name}.rope.scaling.attn_factor", default=1.0) != 1:
        _unsupported(values.file, f"{name}.rope.scaling.attn_factor isn't 1")
    if kind not in ("none", "linear"):
        _unsupported(values.file, f"{name}.rope.scaling.type is {kind[:40]!r}; only none and linear are converted")
    linear = kind == "linear" and bool(factors)
    if name == "llama" and _ROPE_FREQS in entries:
        if linear:
            _unsupported(values.file, f"rotary positions are scaled by {_ROPE_FREQS} and linearly, too")
        return _llama3(values.file, entries[_ROPE_FREQS], head_size, theta)
    if _ROPE_FREQS in entries:
        _unsupported(values.file, f"mlx-lm's {name} has no place for the tensor {_ROPE_FREQS!r}")
    if not linear:
        return None
    return {"rope_type": "linear", "type": "linear", "factor": _shortest(values.number(*factors))}


def _llama3(path: Path, entry: Entry, head_size: int, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3 that divides the frequencies by just these numbers.

    GGUF has the divisors, mlx-lm computes them from Llama 3's rule; so the rule is computed and compared.
    """
    if entry.shape != (head_size // 2,) or entry.dtype != "float32":
        malformed(path, f"expected {head_size // 2} float32, not {entry.dtype} of {entry.shape}", tensor=_ROPE_FREQS)
    stored: Array = np.asarray(entry.read(), np.float64)
    if not (np.isfinite(stored).all() and stored.min() > 0):
        malformed(path, "a divisor of a frequency isn't a positive number", tensor=_ROPE_FREQS)
    factor = _shortest(float(stored.max()))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        _unsupported(path, f"the tensor {_ROPE_FREQS!r} isn't what Llama 3 scales rotary positions by")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _unsupported(path: Path, what: str) -> NoReturn:
    raise UnsupportedError(f"{path}: {what}")
