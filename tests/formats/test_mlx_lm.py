"""mlx-lm: a folder that quantcore converts loads there, with the same logits; one that mlx-lm converts loads here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import convert
from mlx_lm.utils import load_model
from safetensors.numpy import save_file
from test_commands import run
from tokenizers import Tokenizer, models, pre_tokenizers

import quantcore as qc

WIDTH, INNER, HEADS, LAYERS, VOCABULARY = 128, 256, 4, 2, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
TOKENS = mx.array([[1, 5, 9, 2, 60, 33]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, as the Hub has such models."""
    folder = tmp_path_factory.mktemp("llama")
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q_proj", WIDTH), ("k_proj", WIDTH // 2), ("v_proj", WIDTH // 2), ("o_proj", WIDTH)):
            shapes[f"{prefix}.self_attn.{name}"] = (rows, WIDTH)
        shapes |= {f"{prefix}.mlp.{name}": (INNER, WIDTH) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}.mlp.down_proj"] = (WIDTH, INNER)
    tensors = {f"{name}.weight": (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class OurLinear(nn.Module):  # type: ignore[misc]
    """A linear layer or an embedding of mlx-lm's model that calls quantcore instead."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self._weight = weight

    def __call__(self, x: Any) -> Any:
        return qc.take(self._weight, x) if x.dtype == mx.int32 else qc.dot(x, self._weight, backend="mlx")


def our_logits(folder: Path) -> Any:
    """Logits of mlx-lm's dense model with every product and look-up made by quantcore's MLX backend."""
    checkpoint = qc.load(folder, library="mlx")
    dense = {key: value for key, value in checkpoint.config.items() if not key.startswith("quantization")}
    shell, _ = load_model(folder, lazy=True, strict=False)
    fresh = type(shell)(type(shell.args).from_dict(dense))
    for path, module in fresh.named_modules():
        weight = f"{path}.weight"
        if isinstance(module, nn.Linear | nn.Embedding):
            *parents, name = path.split(".")
            parent = fresh
            for part in parents:
                parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
            setattr(parent, name, OurLinear(checkpoint[weight]))
        elif weight in checkpoint:
            module.weight = checkpoint[weight]
    return fresh(TOKENS)


def their_logits(folder: Path) -> Any:
    return load_model(folder)[0](TOKENS)


RECIPES = [
    ["--bits", 4, "--group-size", 64],
    ["--bits", 8, "--group-size", 32, "--rules", "*down_proj*=affine-int3-g128", "--rules", "lm_head*=keep"],
    ["--rules", "*mlp*=mxfp4", "--rules", "*proj*=nvfp4", "--rules", "lm_head*=mxfp8", "--rules", "*embed*=mxfp4"],
    [],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_folder_that_quantcore_converts_loads_in_mlx_lm(model: Path, tmp_path: Path, recipe: list[Any]) -> None:
    assert run("convert", model, tmp_path / "out", *recipe)[0] == 0
    theirs = np.asarray(their_logits(tmp_path / "out"))
    np.testing.assert_array_equal(np.asarray(our_logits(tmp_path / "out")), theirs)
    assert np.isfinite(theirs).all()
    assert theirs.std() > 0.01


def test_exactly_what_mlx_lm_would_have_made(model: Path, tmp_path: Path) -> None:
    run("convert", model, tmp_path / "ours", "--bits", 4, "--group-size", 64)
    convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64, dtype="float32")
    ours, theirs = (mx.load(str(tmp_path / folder / "model.safetensors")) for folder in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(tensor))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_folder_of_a_microscaled_mode_loads_here(model: Path, tmp_path: Path, mode: str) -> None:
    convert(str(model), str(tmp_path / "out"), quantize=True, q_mode=mode, dtype="float32")
    checkpoint = qc.load(tmp_path / "out")
    assert {checkpoint[f"{name}.weight"].scheme for name in ("lm_head", "model.layers.1.mlp.up_proj")} == {
        qc.Scheme(mode)
    }
    np.testing.assert_array_equal(np.asarray(our_logits(tmp_path / "out")), np.asarray(their_logits(tmp_path / "out")))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("recipe", [None, "mixed_3_6"])
def test_a_folder_that_mlx_lm_converts_loads_here(model: Path, tmp_path: Path, recipe: Any, dtype: str) -> None:
    convert(str(model), str(tmp_path / "out"), quantize=True, q_group_size=64, dtype=dtype, quant_predicate=recipe)
    checkpoint = qc.load(tmp_path / "out")
    theirs = load_model(tmp_path / "out")[0]
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    quantized = {path: module for path, module in theirs.named_modules() if isinstance(module, kinds)}
    assert len(quantized) == 2 + 7 * LAYERS
    for path, module in quantized.items():
        loaded = checkpoint[f"{path}.weight"]
        assert (loaded.scheme.bits, loaded.scheme.group_size) == (module.bits, module.group_size)
        np.testing.assert_array_equal(loaded.packed, np.asarray(module.weight))
        np.testing.assert_array_equal(loaded.scales, np.asarray(module.scales))
    names = {name for name, _ in tree_flatten(theirs.parameters())}
    assert set(checkpoint) == {name for name in names if not name.endswith((".scales", ".biases"))}
    # In half precision MLX on a CPU also accumulates in it, which quantcore's MLX backend doesn't.
    tolerance = {"float32": 0.0, "float16": 5e-3}[dtype]
    ours = np.asarray(our_logits(tmp_path / "out"))
    np.testing.assert_allclose(ours, np.asarray(theirs(TOKENS)), rtol=0, atol=tolerance)
