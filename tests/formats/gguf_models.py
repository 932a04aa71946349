"""Small models as GGUF files: written by gguf-py, with its own table of names, from what the Hub would have.

Rows are ordered as llama.cpp's converter orders them (conversion/llama.py, `permute`), keys are those that it writes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

__all__ = ["LLAMA3", "MODELS", "config", "weights_of", "write_gguf"]

Arrays = dict[str, np.ndarray[Any, Any]]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """The config.json of a small model."""
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    biases = {"attention_bias": False, "mlp_bias": False} if kind == "llama" else {}
    return {
        "architectures": [classes[kind]],
        "model_type": kind,
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **biases,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


MODELS = {
    "llama": config(),
    "llama, tied": config(tie_word_embeddings=True, num_key_value_heads=4),
    "llama, biases": config(attention_bias=True, mlp_bias=True),
    "llama, heads of 48": config(head_dim=48),
    "llama, scaled linearly": config(rope_scaling={"rope_type": "linear", "type": "linear", "factor": 4.0}),
    "llama 3": config(rope_theta=500000.0, rope_scaling=LLAMA3, eos_token_id=[2, 3]),
    "qwen2": config("qwen2", rope_theta=1e6, rms_norm_eps=1e-6),
    "qwen3": config("qwen3", head_dim=64, tie_word_embeddings=True),
}


def weights_of(model: dict[str, Any]) -> Arrays:
    """Random weights under Hugging Face's names."""
    rng = np.random.default_rng(0)
    width, inner, size = model["hidden_size"], model["intermediate_size"], model["head_dim"]
    queries, keys = (model[f"num_{part}_heads"] * size for part in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (model["vocab_size"], width), "model.norm.weight": (width,)}
    if not model["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (model["vocab_size"], width)
    attention = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
    }
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    biased = {"q_proj", "k_proj", "v_proj"} if model["model_type"] == "qwen2" else set()
    biased |= (set(attention) if model.get("attention_bias") else set()) | (
        set(mlp) if model.get("mlp_bias") else set()
    )
    for layer in range(model["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        if model["model_type"] == "qwen3":
            shapes |= {f"{prefix}.self_attn.{name}.weight": (size,) for name in ("q_norm", "k_norm")}
        for group, parts in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in parts.items():
                shapes[f"{prefix}.{group}.{name}.weight"] = shape
                if name in biased:
                    shapes[f"{prefix}.{group}.{name}.bias"] = shape[:1]
    return {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}


def rows_of(model: dict[str, Any], name: str, tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of a tensor, q's and k's in the order in which the converter writes them."""
    heads = {"q_proj": model["num_attention_heads"], "k_proj": model["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None or model["model_type"] != "llama":
        return tensor
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def llama3_divisors(model: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What conversion/llama.py writes as rope_freqs.weight."""
    scaling, found = model["rope_scaling"], []
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    for exponent in np.arange(0, model["head_dim"], 2, dtype=np.float32) / np.float32(model["head_dim"]):
        wavelength = 2 * math.pi / (1.0 / np.float32(model["rope_theta"]) ** exponent)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)


def keys_of(model: dict[str, Any]) -> dict[str, Any]:
    """The key-values of a GGUF of the model."""
    kind, scaling = model["model_type"], model["rope_scaling"] or {}
    found = {
        "block_count": model["num_hidden_layers"],
        "context_length": model["max_position_embeddings"],
        "embedding_length": model["hidden_size"],
        "feed_forward_length": model["intermediate_size"],
        "attention.head_count": model["num_attention_heads"],
        "attention.head_count_kv": model["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": model["rms_norm_eps"],
        "rope.freq_base": model["rope_theta"],
    }
    if model["head_dim"] * model["num_attention_heads"] != model["hidden_size"]:
        found |= {"attention.key_length": model["head_dim"], "attention.value_length": model["head_dim"]}
    if kind == "llama":
        found["rope.dimension_count"] = model["head_dim"]
    if scaling.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    ends = model["eos_token_id"] if isinstance(model["eos_token_id"], list) else [model["eos_token_id"]]
    tokens = dict(zip(("bos", "eos", "eot"), (model["bos_token_id"], *ends), strict=False))
    return {f"{kind}.{key}": value for key, value in found.items()} | {
        f"tokenizer.ggml.{token}_token_id": number for token, number in tokens.items()
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    whole = writer.add_int32 if isinstance(value, int) and value < 0 else writer.add_uint32
    kinds = {bool: writer.add_bool, int: whole, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def write_gguf(path: Path, model: dict[str, Any], kind: str | None = None, **changes: Any) -> Path:
    """A GGUF as llama.cpp converts the model, its matrices of that type; `changes` replace keys and tensors or,
    where they are None, drop them."""
    architecture = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}[
        model["model_type"]
    ]
    table = get_tensor_name_map(architecture, model["num_hidden_layers"])
    writer = GGUFWriter(path, model["model_type"])
    for key, value in (keys_of(model) | {k: v for k, v in changes.items() if not isinstance(v, np.ndarray)}).items():
        if value is not None and not key.endswith((".weight", ".bias")):
            add(writer, key, value)
    tensors = {}
    for name, tensor in weights_of(model).items():
        tensors[table.get_name(name, try_suffixes=(".weight", ".bias"))] = rows_of(model, name, tensor)
    if (model["rope_scaling"] or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(model)
    tensors |= {name: value for name, value in changes.items() if name.endswith((".weight", ".bias"))}
    for name, tensor in tensors.items():
        if tensor is not None and kind is not None and tensor.ndim > 1:
            quantized = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(tensor, quantized), raw_dtype=quantized)
        elif tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
