"""Checkpoints made from random codes in each format's own packing, with the weights that the format says they are.

The packings are written here a second time, a code at a time where the library that defines them does so, and share
nothing with the readers. Each maker returns the tensors of a file, its config, and the float32 weights by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, awq/utils/packing_utils.py


class Made(NamedTuple):
    tensors: dict[str, Array]
    config: dict[str, Any]
    weights: dict[str, Array]


def write(folder: Path, made: Made) -> Path:
    """The checkpoint as a folder."""
    folder.mkdir(exist_ok=True)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in made.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(made.config))
    return folder


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float16) -> Array:
    return (rng.standard_normal(shape) * 0.02).astype(dtype)


def stream(codes: Array, bits: int) -> Array:
    """Rows of codes as one little-endian bitstream each, by way of Python's integers; int32 words."""
    rows = []
    for row in codes:
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), "<i4"))
    return np.stack(rows)


def affine(codes: Array, zeros: Array, scales: Array, group: int) -> Array:
    """``(code - zero) * scale`` in float32; all (out, ...)."""
    q = codes.astype(np.float32)
    z, s = (np.repeat(part.astype(np.float32), group, axis=1)[:, : q.shape[1]] for part in (zeros, scales))
    return (q - z) * s


def awq(seed: int = 0, out: int = 24, in_features: int = 128, group: int = 64, dtype: Any = np.float16) -> Made:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (in_features, out))
    zeros = rng.integers(0, 16, (in_features // group, out))
    scales = random_scales(rng, zeros.shape, dtype)

    def packed(values: Array) -> Array:
        words = np.zeros((len(values), out // 8), np.uint32)
        for column in range(out // 8):
            for nibble, source in enumerate(AWQ_ORDER):
                words[:, column] |= values[:, 8 * column + source].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    tensors = {"m.qweight": packed(codes), "m.qzeros": packed(zeros), "m.scales": scales}
    tensors |= {"m.bias": np.ones(out, np.float16), "norm.weight": np.ones(in_features, np.float16)}
    return Made(tensors, {"quantization_config": config}, {"m.weight": affine(codes.T, zeros.T, scales.T, group)})


def gptq(
    seed: int = 0,
    bits: int = 4,
    out: int = 32,
    in_features: int = 128,
    group: int = 32,
    version: str = "gptq",
    dtype: Any = np.float16,
) -> Made:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (out, in_features))
    first = version == "gptq"
    zeros = rng.integers(first, (1 << bits), (out, in_features // group))
    scales = random_scales(rng, zeros.shape, dtype)
    tensors = {
        "m.qweight": stream(codes, bits).T,
        "m.qzeros": stream(zeros.T - first, bits),
        "m.scales": scales.T,
        "m.g_idx": np.arange(in_features, dtype=np.int32) // group,
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
    return Made(tensors, {"quantization_config": config}, {"m.weight": affine(codes, zeros, scales, group)})


def hqq(
    seed: int = 0, bits: int = 4, out: int = 16, in_features: int = 128, group: int = 64, dtype: Any = np.float16
) -> Made:
    rng = np.random.default_rng(seed)
    groups = out * in_features // group
    codes = rng.integers(0, 1 << bits, (groups, group))
    zeros = rng.uniform(1, (1 << bits) - 1, (groups, 1)).astype(dtype)
    scales = random_scales(rng, zeros.shape, dtype)
    lanes, word = {8: (1, np.uint8), 4: (2, np.uint8), 3: (10, np.int32), 2: (4, np.uint8), 1: (8, np.uint8)}[bits]
    padded = np.zeros((-(-groups // lanes) * lanes, group), np.int64)
    padded[:groups] = codes
    step = len(padded) // lanes
    packed = np.zeros((step, group), np.int64)
    for lane in range(lanes):
        packed |= padded[lane * step : (lane + 1) * step] << (bits * (lanes - 1 - lane))
    tensors = {
        "m.W_q": packed.astype(word),
        "m.scale": scales,
        "m.zero": zeros,
        "m.shape": np.array([out, in_features], np.int64),
        "m.nbits": np.array(bits, np.int32),
        "m.group_size": np.array(group, np.int32),
        "m.axis": np.array(1, np.int32),
        "m.packing": np.frombuffer(b"4bit_u8", np.uint8),
        "m.view_as_float": np.array(0, np.uint8),
        "m.quant_scale": np.array(0, np.uint8),
        "m.quant_zero": np.array(0, np.uint8),
    }
    weight = ((codes.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)).reshape(out, -1)
    return Made(tensors, {"quantization_config": {"quant_method": "hqq"}}, {"m.weight": weight})


def loose(codes: Array, bits: int) -> Array:
    """Rows of codes, 32 // bits in a word, as compressed-tensors once packed; int32 words."""
    per_word = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // per_word)), np.uint32)
    for i in range(codes.shape[1]):
        words[:, i // per_word] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % per_word))
    return words.view(np.int32)


def compressed_tensors(
    seed: int = 0,
    bits: int = 4,
    out: int = 20,
    in_features: int = 128,
    group: int | None = 64,
    symmetric: bool = False,
    dense: bool = True,
    dtype: Any = BFLOAT16,
) -> Made:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (out, in_features))
    size = group or in_features
    half = 1 << (bits - 1)
    zeros = (
        np.full((out, in_features // size), half)
        if symmetric
        else rng.integers(0, 1 << bits, (out, in_features // size))
    )
    scales = random_scales(rng, zeros.shape, dtype)
    pack = stream if dense else loose
    tensors = {
        "m.weight_packed": pack(codes, bits),
        "m.weight_scale": scales,
        "m.weight_shape": np.array([out, in_features], np.int64),
    }
    if not symmetric:
        tensors["m.weight_zero_point"] = pack(zeros.T, bits).T
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return Made(tensors, {"quantization_config": config}, {"m.weight": affine(codes, zeros, scales, size)})


def mlx(
    seed: int = 0,
    bits: int = 4,
    group: int = 64,
    shape: tuple[int, ...] = (8, 128),
    dtype: Any = np.float16,
    modules: tuple[str, ...] = ("m",),
) -> Made:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    weights = {}
    for module in modules:
        codes = rng.integers(0, 1 << bits, shape)
        scales = random_scales(rng, (*shape[:-1], shape[-1] // group), dtype)
        biases = random_scales(rng, scales.shape, dtype)
        packed = stream(codes.reshape(-1, shape[-1]), bits).view(np.uint32).reshape(*shape[:-1], -1)
        tensors |= {f"{module}.weight": packed, f"{module}.scales": scales, f"{module}.biases": biases}
        spread = [np.repeat(part.astype(np.float32), group, axis=-1) for part in (scales, biases)]
        weights[f"{module}.weight"] = codes.astype(np.float32) * spread[0] + spread[1]
    tensors["norm.weight"] = np.ones(shape[-1], dtype)
    return Made(tensors, {"quantization": {"bits": bits, "group_size": group}}, weights)


MAKERS: Mapping[str, Any] = {
    "awq": awq,
    "gptq": gptq,
    "hqq": hqq,
    "compressed-tensors": compressed_tensors,
    "mlx": mlx,
}
