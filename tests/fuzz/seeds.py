"""A small sound file of each format, for fuzzing to start from."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save

import quantcore

sys.path.insert(0, str(Path(__file__).parent.parent / "formats"))

import makers
from gguf_models import LLAMA3, config, write_gguf
from test_gguf import blocks_of
from test_onnx import Weight, model

__all__ = ["SEEDS", "write"]

Files = dict[str, bytes]
"""By name, the files of a checkpoint."""


def _folder(made: makers.Made) -> Files:
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in made.tensors.items()}
    return {"model.safetensors": save(tensors), "config.json": json.dumps(made.config).encode()}


def _sharded() -> Files:
    made = makers.mlx(modules=("a", "b"), shape=(2, 64), bits=4, group=32)
    names = list(made.tensors)
    shards = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    files = {shard: save({name: made.tensors[name] for name in its}) for shard, its in shards.items()}
    weight_map = {name: shard for shard, its in shards.items() for name in its}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["config.json"] = json.dumps(made.config).encode()
    return files


def _microscaled() -> Files:
    qw = quantcore.quantize(np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32), "nvfp4")
    config = {"quantization": {"mode": "nvfp4", "bits": 4, "group_size": 16}}
    tensors = {"m.weight": qw.packed, "m.scales": qw.scales}
    return {"model.safetensors": save(tensors), "config.json": json.dumps(config).encode()}


def _gguf() -> Files:
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "MXFP4", "NVFP4"]
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "m.gguf", "llama")
        writer.add_array("words", ["", "a", "Ġthe"])
        writer.add_array("ids", [1, -2, 3])
        writer.add_bool("flag", True)
        for kind in kinds:
            writer.add_tensor(kind, blocks_of(kind, (2, 256)), raw_dtype=GGMLQuantizationType[kind])
        writer.add_tensor("dense", np.ones((2, 3), np.float32))
        writer.add_tensor("vector", blocks_of("Q8_0", (64,)), raw_dtype=GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"m.gguf": (Path(folder) / "m.gguf").read_bytes()}


def _gguf_model() -> Files:
    """A whole model with its tokenizer, which can be had under Hugging Face's names."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = config(vocab_size=6, num_hidden_layers=1, rope_scaling={**LLAMA3, "factor": 2.0}, **sizes, **heads)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["<s>", "a", "</s>", "b", "ab", "<x>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 1, 3, 1, 1, 4],
    }
    with tempfile.TemporaryDirectory() as folder:
        return {"m.gguf": write_gguf(Path(folder) / "m.gguf", model, "Q4_0", **keys).read_bytes()}


def _onnx() -> Files:
    made: onnx.ModelProto = model(Weight(4, 4, 100, 32, "packed"))
    return {"m.onnx": made.SerializeToString()}


SEEDS: dict[str, Files] = {
    "safetensors": {"m.safetensors": save({"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.uint8)})},
    "sharded": _sharded(),
    "microscaled": _microscaled(),
    "mlx": _folder(makers.mlx(shape=(2, 64), group=32)),
    "awq": _folder(makers.awq(out=8, in_features=64, group=32)),
    "gptq": _folder(makers.gptq(out=32, in_features=64, group=32)),
    "hqq": _folder(makers.hqq(out=4, in_features=64, group=32)),
    "compressed-tensors": _folder(makers.compressed_tensors(out=4, in_features=64, group=32)),
    "gguf": _gguf(),
    "gguf-model": _gguf_model(),
    "onnx": _onnx(),
}


def write(folder: Path, files: Files) -> Path:
    """The files in a folder, in place of what is there; the path to load."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder if len(files) > 1 else folder / next(iter(files))
