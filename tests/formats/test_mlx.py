"""MLX folders: what mx.quantize made is read back as it was, whatever the config says of single modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import makers
import mlx.core as mx
import numpy as np
import pytest

import quantcore as qc
from quantcore import Scheme


def write(folder: Path, tensors: dict[str, mx.array], quantization: Any) -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({"quantization": quantization, "quantization_config": quantization}))
    return folder


def quantized(module: str, bits: int, group: int, shape: tuple[int, ...] = (6, 256), dtype: Any = mx.float32) -> Any:
    w = mx.random.normal(shape, key=mx.random.key(bits)).astype(dtype)
    parts = mx.quantize(w, group_size=group, bits=bits)
    return dict(zip((f"{module}.weight", f"{module}.scales", f"{module}.biases"), parts, strict=True))


def dequantized(tensors: Any, module: str, bits: int, group: int) -> np.ndarray[Any, Any]:
    parts = (tensors[f"{module}.{suffix}"] for suffix in ("weight", "scales", "biases"))
    return np.asarray(mx.dequantize(*parts, group_size=group, bits=bits).astype(mx.float32))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_scheme(tmp_path: Path, bits: int, group: int) -> None:
    tensors = quantized("a.b", bits, group) | {"a.b.bias": mx.ones(6), "norm.weight": mx.ones(4)}
    checkpoint = qc.load(write(tmp_path, tensors, {"bits": bits, "group_size": group}))
    assert checkpoint.format == "mlx"
    assert set(checkpoint) == {"a.b.weight", "a.b.bias", "norm.weight"}
    loaded = checkpoint["a.b.weight"]
    assert loaded.scheme is Scheme(bits=bits, group_size=group)
    assert loaded.shape == checkpoint.entries["a.b.weight"].shape == (6, 256)
    np.testing.assert_array_equal(loaded.dequantize(), dequantized(tensors, "a.b", bits, group))
    for leaf in loaded.flatten()[0]:
        assert not leaf.flags.owndata


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_and_stacks(tmp_path: Path, dtype: Any) -> None:
    tensors = quantized("experts", 4, 64, (3, 5, 128), dtype)
    path = write(tmp_path, tensors, {"bits": 4, "group_size": 64})
    loaded = qc.load(path)["experts.weight"]
    assert loaded.shape == (3, 5, 128)
    assert loaded.dtype_name == str(dtype).rpartition(".")[2]
    on_mlx = qc.load(path, library="mlx")["experts.weight"]
    assert on_mlx.library == "mlx"
    np.testing.assert_array_equal(on_mlx.to("numpy").dequantize(), loaded.dequantize())


def test_overrides(tmp_path: Path) -> None:
    tensors = quantized("a", 4, 64) | quantized("b", 8, 32) | quantized("c", 4, 128) | {"d.weight": mx.ones((2, 64))}
    tensors |= quantized("e", 2, 64)
    quantization = {
        "bits": 8,
        "group_size": 32,
        "a": {},  # replaces as a whole: affine's defaults, not the global values
        "c": {"bits": 4, "group_size": 128, "mode": "affine"},
        "d": False,
        "e": {"bits": 2},
        "elsewhere": False,
    }
    checkpoint = qc.load(write(tmp_path, tensors, quantization))
    schemes = {name: str(entry.scheme) for name, entry in checkpoint.entries.items()}
    assert schemes == {
        "a.weight": "affine-int4-g64",
        "b.weight": "affine-int8-g32",
        "c.weight": "affine-int4-g128",
        "d.weight": "None",
        "e.weight": "affine-int2-g64",
    }
    for module, bits, group in (("a", 4, 64), ("b", 8, 32), ("c", 4, 128), ("e", 2, 64)):
        expected = dequantized(tensors, module, bits, group)
        np.testing.assert_array_equal(checkpoint[f"{module}.weight"].dequantize(), expected)


def test_rename_reaches_the_overrides(tmp_path: Path) -> None:
    # 8 bits in groups of 32 and 4 in groups of 64 have the same shapes: only the override tells.
    tensors = quantized("model.a", 4, 64) | quantized("model.b", 8, 32)
    base = {"bits": 4, "group_size": 64}
    own = {"bits": 8, "group_size": 32}
    expected = dequantized(tensors, "model.b", 8, 32)

    def rename(name: str) -> str:
        return name.replace("model.", "language.")

    for key in ("model.b", "language.b"):
        checkpoint = qc.load(write(tmp_path, tensors, base | {key: own}), rename=rename)
        np.testing.assert_array_equal(checkpoint["language.b.weight"].dequantize(), expected)
        assert checkpoint.config["quantization"]["language.b"] == own
        assert checkpoint.config["quantization_config"] == checkpoint.config["quantization"]
    with pytest.raises(qc.FormatError, match=r"override for 'language\.b' fits no module here.*rename"):
        qc.load(tmp_path)
    with pytest.raises(qc.FormatError, match="the same module, differ"):
        qc.load(write(tmp_path, tensors, base | {"model.b": own, "language.b": base}), rename=rename)


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_microscaled_modes_there_and_back(tmp_path: Path, mode: str, bits: int, group: int) -> None:
    dense = mx.random.normal((4, 128), key=mx.random.key(3))
    w, scales = mx.quantize(dense, group_size=group, bits=bits, mode=mode)
    tensors = {"a.weight": w, "a.scales": scales} | quantized("b", 4, 64)
    settings = {"bits": 4, "group_size": 64, "a": {"mode": mode}}
    checkpoint = qc.load(write(tmp_path / "in", tensors, settings))
    assert (checkpoint.entries["a.weight"].kind, checkpoint.entries["a.weight"].shape) == (mode, (4, 128))
    loaded = checkpoint["a.weight"]
    assert (loaded.scheme, loaded.dtype_name, loaded.biases) == (qc.Scheme(mode), "bfloat16", None)
    expected = mx.dequantize(w, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(loaded.dequantize(dtype="float32"), np.asarray(expected))
    assert checkpoint["b.weight"].shape == (6, 256)
    qc.save(checkpoint, tmp_path / "out")
    again = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert mx.array_equal(again[name], tensor), name
        assert again[name].dtype == tensor.dtype
    own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    given = {"group_size": group, "bits": bits, "mode": mode}
    assert given in (own.get("a"), {key: own[key] for key in given})


@pytest.mark.parametrize(
    ("change", "settings", "error", "why"),
    [
        ({"a.scales": np.full((4, 4), 255, np.uint8)}, {}, qc.FormatError, r"'a\.scales', byte \d+: a scale is NaN"),
        ({"a.scales": np.ones((4, 4), np.float32)}, {}, qc.FormatError, "dtype float32; expected uint8 in mxfp4"),
        ({"a.biases": np.ones((4, 4), np.float32)}, {}, qc.FormatError, "mxfp4 has no biases"),
        ({}, {"bits": 8, "group_size": 16}, qc.FormatError, "mxfp4 has 4 bits in groups of 32"),
        ({"a.global_scale": np.ones(1, np.float32)}, {}, qc.UnsupportedError, "with a a.global_scale beside it"),
    ],
)
def test_microscaled_weights_that_are_wrong(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], error: type[Exception], why: str
) -> None:
    w, scales = mx.quantize(mx.ones((4, 128)), mode="mxfp4")
    tensors = {"a.weight": w, "a.scales": scales} | {name: mx.array(part) for name, part in change.items()}
    with pytest.raises(error, match=why):
        qc.load(write(tmp_path, tensors, {"mode": "mxfp4", **settings}))["a.weight"]


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"bits": 4, "group_size": 64, "m": False}, "'m' is said not to be quantized, but has scales"),
        ({"bits": 4, "group_size": 64, "norm": {"bits": 4}}, r"norm\.weight'.*has no norm\.scales"),
        ({"bits": 4, "group_size": 32}, r"isn't that of 4 bits in groups of 32"),
        ({"bits": 7, "group_size": 64}, "isn't that of 7 bits"),
        ({"bits": 9, "group_size": 64}, "9 bits in groups of 64"),
        ({"bits": "4", "group_size": 64}, "bits must be an integer, not '4'"),
        ({"bits": True, "group_size": 64}, "bits must be an integer, not 'True'"),
        ({"bits": 4, "group_size": -1}, "4 bits in groups of -1"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp3"}, "unknown mode 'mxfp3'"),
        ({"bits": 4, "group_size": 64, "mode": 3}, "mode must be a string"),
        ([4, 64], "quantization must be an object, not list"),
        ("4", "quantization must be an object, not str"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, quantization: Any, why: str) -> None:
    made = makers.mlx()
    made.config["quantization"] = quantization
    with pytest.raises(qc.FormatError, match=why):
        qc.load(makers.write(tmp_path, made))


def test_a_single_shard_knows_its_config(tmp_path: Path) -> None:
    made = makers.mlx()
    makers.write(tmp_path, made)
    loaded = qc.load(tmp_path / "model.safetensors")["m.weight"]
    np.testing.assert_array_equal(loaded.dequantize(dtype="float32"), made.weights["m.weight"])


def test_nan_scale_names_the_byte(tmp_path: Path) -> None:
    made = makers.mlx()
    made.tensors["m.biases"][2, 1] = np.inf
    checkpoint = qc.load(makers.write(tmp_path, made))
    with pytest.raises(qc.FormatError, match=r"tensor 'm\.biases', byte \d+: a scale or bias is inf"):
        checkpoint["m.weight"]
