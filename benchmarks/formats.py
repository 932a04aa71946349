"""Opening and reading checkpoints, beside gguf-py's reader and MLX's, in one run.

    python benchmarks/formats.py                 # a GGUF like SmolLM2-135M's Q4_1, and an MLX folder made of it
    python benchmarks/formats.py --gguf FILE     # any other

Each reading makes every tensor's arrays, in memory or as views of the file, as the reader has it; gguf-py itself has
no form for quantized weights but dense float32, so both its views of blocks and its dequantizers are timed, the latter
against `dequantize` here. The file is in the page cache throughout.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import interleaved, print_table, repeated, save, shown, spread
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

import quantcore as qc

WIDTH, INNER, LAYERS, VOCABULARY = 576, 1536, 30, 49152


def make_gguf(path: Path) -> None:
    """Random weights in the shapes and types of SmolLM2-135M's Q4_1, with a vocabulary as large."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token{i}" for i in range(VOCABULARY)])
    writer.add_array("tokenizer.ggml.merges", [f"a{i} b{i}" for i in range(VOCABULARY)])
    writer.add_array("tokenizer.ggml.token_type", [1] * VOCABULARY)

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType) -> None:
        dense = rng.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, quants.quantize(dense, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH, GGMLQuantizationType.Q8_0)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("ffn_down", WIDTH, INNER),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("attn_k", WIDTH // 3, WIDTH),
            ("attn_v", WIDTH // 3, WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_mlx(path: Path) -> dict[str, mx.array]:
    """Read a file with MLX, arrays and all."""
    arrays = mx.load(str(path))
    mx.eval(arrays)
    return arrays


def on_mlx(path: Path) -> None:
    """Read a checkpoint into MLX's arrays with quantcore."""
    tensors = list(qc.load(path, library="mlx").values())
    mx.eval([leaf for t in tensors for leaf in (t.flatten()[0] if qc.is_quantized(t) else (t,))])


def dequantized(path: Path) -> None:
    """Read and dequantize every tensor with quantcore."""
    for tensor in qc.load(path).values():
        if qc.is_quantized(tensor):
            tensor.dequantize()


def dequantized_by_gguf(path: Path) -> None:
    """Read and dequantize every tensor with gguf-py."""
    for tensor in GGUFReader(path).tensors:
        quants.dequantize(tensor.data, tensor.tensor_type)


def main() -> None:
    """Time all readers on both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, help="a GGUF file; by default one is made")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        gguf = options.gguf or Path(name) / "m.gguf"
        if options.gguf is None:
            make_gguf(gguf)
        mlx = Path(name) / "mlx"
        qc.save(qc.load(gguf), mlx)
        shard = mlx / "model.safetensors"
        calls: dict[str, Callable[[], object]] = {
            "gguf: open, quantcore.load": lambda: qc.load(gguf),
            "gguf: open, gguf.GGUFReader": lambda: GGUFReader(gguf),
            "gguf: tensors, quantcore, NumPy": lambda: dict(qc.load(gguf)),
            "gguf: tensors, quantcore, MLX": lambda: on_mlx(gguf),
            "gguf: tensors, mx.load": lambda: with_mlx(gguf),
            "gguf: float32, quantcore": lambda: dequantized(gguf),
            "gguf: float32, gguf-py": lambda: dequantized_by_gguf(gguf),
            "mlx: tensors, quantcore, NumPy": lambda: dict(qc.load(mlx)),
            "mlx: tensors, quantcore, MLX": lambda: on_mlx(mlx),
            "mlx: tensors, mx.load": lambda: with_mlx(shard),
        }
        timed = interleaved({key: repeated(call) for key, call in calls.items()}, options.repeats, 0.2)
        sizes = {"gguf": gguf.stat().st_size, "mlx": shard.stat().st_size}
    found = {key: spread(values, 1e3) for key, values in timed.items()}
    print_table("Reading a checkpoint", ["", "ms"], [[key, shown(value)] for key, value in found.items()])
    save("formats", {"bytes": sizes, "made": options.gguf is None, "ms": found})


if __name__ == "__main__":
    main()
