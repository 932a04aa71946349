"""What the models are that a GGUF's tensors can become: their classes, their tensors, and the names in both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["ARCHITECTURES", "ATTENTION", "LAYER_TENSORS", "MLP", "ROPE_FREQS", "Architecture", "Tensor", "tensors_of"]


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

ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP: Final = ("ffn_gate", "ffn_up", "ffn_down")

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

LAYER_TENSORS: Final = 9
"""What a layer has at least, so that no more layers are looked for than there can be."""

ROPE_FREQS: Final = "rope_freqs.weight"
"""A tensor that GGUF has for a setting of the config."""


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
    biased.update(ATTENTION if config.get("attention_bias") else (), MLP if config.get("mlp_bias") else ())
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
