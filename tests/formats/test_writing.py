"""Saving: an MLX folder, whole or not at all; what is read from one and saved again is the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import makers
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from test_gguf import blocks_of, write

import quantcore as qc
from quantcore import Scheme
from quantcore.formats import writing

RNG = np.random.default_rng(0)


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder, as the safetensors library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
    return found


def weight(bits: int = 4, group: Any = 64, shape: tuple[int, ...] = (8, 256)) -> qc.QuantizedTensor:
    return qc.quantize(RNG.standard_normal(shape).astype(np.float32), bits=bits, group_size=group)


def test_mlx_folder_comes_back_byte_for_byte(tmp_path: Path) -> None:
    made = makers.mlx(modules=("a", "b.c"))
    own = makers.mlx(seed=1, bits=8, group=32, dtype=ml_dtypes.bfloat16, shape=(2, 4, 64))
    made.tensors.update(
        {name.replace("m.", "experts."): part for name, part in own.tensors.items() if name != "norm.weight"}
    )
    made.config["quantization"]["experts"] = {"bits": 8, "group_size": 32}
    made.config["model_type"] = "llama"
    makers.write(tmp_path / "a", made)
    qc.save(qc.load(tmp_path / "a"), tmp_path / "b")
    assert raw(tmp_path / "b") == raw(tmp_path / "a")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["experts"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert {key: config["quantization"][key] for key in ("bits", "group_size")} == {"bits": 4, "group_size": 64}
    qc.save(qc.load(tmp_path / "b", library="mlx"), tmp_path / "c")
    assert raw(tmp_path / "c") == raw(tmp_path / "a")


def test_mlx_reads_what_is_saved(tmp_path: Path) -> None:
    state = {"m.weight": weight(), "m.bias": np.ones(8, np.float16), "bf": np.ones(3, ml_dtypes.bfloat16)}
    qc.save(state, tmp_path / "out")
    loaded, metadata = mx.load(str(tmp_path / "out" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    dense = mx.dequantize(loaded["m.weight"], loaded["m.scales"], loaded["m.biases"], 64, 4)
    np.testing.assert_array_equal(np.asarray(dense), state["m.weight"].dequantize())
    assert loaded["bf"].dtype == mx.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }


@pytest.mark.parametrize(
    ("group", "shape", "expected"), [(256, (4, 512), 128), ("row", (4, 96), 32), ("row", (4, 128), 128)]
)
def test_larger_groups_are_split_exactly(tmp_path: Path, group: Any, shape: tuple[int, ...], expected: int) -> None:
    qw = weight(group=group, shape=shape)
    qc.save({"m.weight": qw}, tmp_path / "out")
    loaded = qc.load(tmp_path / "out")["m.weight"]
    assert loaded.scheme is Scheme(bits=4, group_size=expected)
    np.testing.assert_array_equal(loaded.dequantize(), qw.dequantize())


@pytest.mark.parametrize(
    ("state", "error", "why"),
    [
        ({"m.weight": weight(group=16)}, qc.InexactConversionError, "'m.weight' has groups of 16"),
        (
            {"m.weight": qc.quantize(np.ones((2, 100), np.float32), pad=True)},
            qc.InexactConversionError,
            "rows of 100, which aren't whole groups",
        ),
        ({"m.weight": weight(group="row", shape=(2, 72))}, qc.InexactConversionError, "groups of 72"),
        ({"weight": weight()}, ValueError, "names a quantized weight X.weight"),
        ({"m.kernel": weight()}, ValueError, "names a quantized weight X.weight, not 'm.kernel'"),
        ({"m.weight": weight().mT}, ValueError, "transposed"),
        ({"m.weight": weight(), "m.scales": np.ones(2)}, ValueError, "'m.scales' and 'm.weight' are both written"),
        ({"m.weight": [1, 2]}, TypeError, "must be an array or a QuantizedTensor, not list"),
        ({"a": np.ones(2, np.complex128)}, TypeError, "dtype complex128"),
        ({1: np.ones(2)}, TypeError, "names must be strings"),
        ({"\udc80": np.ones(2)}, ValueError, "can't be written as UTF-8"),
        ({"__metadata__": np.ones(2)}, ValueError, "'__metadata__', which safetensors keeps"),
        ({"m.weight": np.ones(2), "m.scales": np.ones(2)}, ValueError, "MLX's names for the parts of a quantized"),
        ({}, ValueError, "no tensors"),
        ([], TypeError, "must be a mapping"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, state: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        qc.save(state, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "error", "why"),
    [
        ({"a": 1, "theta": float("nan")}, ValueError, "'theta' of the config"),
        ({"n": np.int64(3)}, TypeError, "'n' of the config"),
        (3, TypeError, "config must be a mapping, not int"),
    ],
)
def test_a_config_that_cannot_be_read_back_leaves_nothing(
    tmp_path: Path, config: Any, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        qc.save({"a": np.ones(2)}, tmp_path / "out", config=config)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_without_saying(tmp_path: Path) -> None:
    target = tmp_path / "out"
    qc.save({"a": np.ones(2)}, target)
    before = raw(target)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qc.save({"b": np.ones(3)}, target)
    assert raw(target) == before
    qc.save({"b": np.ones(3)}, target, overwrite=True)
    assert list(qc.load(target)) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder with a folder", "folder of other things", "link"])
def test_what_is_no_checkpoint_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("x")
    elif kind == "link":
        (tmp_path / "real").mkdir()
        target.symlink_to(tmp_path / "real")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("x")
        if kind == "folder with a folder":
            (target / "config.json").write_text("{}")
            (target / "src").mkdir()
    with pytest.raises(FileExistsError, match="isn't a checkpoint folder"):
        qc.save({"b": np.ones(3)}, target, overwrite=True)


def test_a_failing_save_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    qc.save({"a": np.ones(2)}, target)

    class Failing(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name == "b":
                raise KeyboardInterrupt
            return np.ones(5)

        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b"])

        def __len__(self) -> int:
            return 2

    with pytest.raises(KeyboardInterrupt):
        qc.save(Failing(), target, overwrite=True)
    assert qc.load(target)["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_save_leaves_nothing_that_loads(tmp_path: Path) -> None:
    code = """
import sys, time, numpy as np, quantcore as qc
from collections.abc import Mapping
class Slow(Mapping):
    def __getitem__(self, name):
        if name == "b":
            print("waiting", flush=True)
            time.sleep(60)
        return np.ones((64, 64))
    def __iter__(self): return iter("ab")
    def __len__(self): return 2
qc.save(Slow(), sys.argv[1])
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"waiting"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    for path in (left, *left.iterdir()):
        with pytest.raises(qc.FormatError):
            qc.load(path)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    state = {f"layers.{i}.weight": weight(shape=(64, 128)) for i in range(8)} | {"huge": np.ones(30_000, np.uint8)}
    qc.save(state, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    loaded = qc.load(tmp_path / "out")
    assert set(loaded) == set(state)
    assert index["metadata"]["total_size"] == loaded.nbytes
    for name in state:
        if name != "huge":
            np.testing.assert_array_equal(loaded[name].dequantize(), state[name].dequantize())


def test_a_header_longer_than_foreseen(tmp_path: Path) -> None:
    state = {"\x01" * 300 + str(i): np.full((1,) * 30, i) for i in range(20)}
    qc.save(state, tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    assert set(loaded) == set(state)
    assert all(loaded[name].shape == (1,) * 30 and loaded[name].item() == state[name].item() for name in state)
    assert len(raw(tmp_path / "out")) == 20


def test_strided_and_big_endian_arrays(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    qc.save(
        {"a": array.T, "b": array[::2, ::3], "c": array.astype(">f4"), "d": np.float32(3) * np.ones(())}, tmp_path / "o"
    )
    loaded = qc.load(tmp_path / "o")
    np.testing.assert_array_equal(loaded["a"], array.T)
    np.testing.assert_array_equal(loaded["b"], array[::2, ::3])
    np.testing.assert_array_equal(loaded["c"], array)
    assert loaded["d"].shape == ()


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    class Made(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return np.full((1024, 1024), int(name), np.float32)

        def __iter__(self) -> Iterator[str]:
            return iter(map(str, range(16)))

        def __len__(self) -> int:
            return 16

    tracemalloc.start()
    try:
        qc.save(Made(), tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * (4 << 20)


def test_gguf_to_mlx_is_exact(tmp_path: Path) -> None:
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "TQ2_0"]
    path = write(tmp_path / "m.gguf", {f"{kind}.weight": (blocks_of(kind), kind) for kind in kinds})
    qc.save(qc.load(path), tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    parts = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        qw = loaded[tensor.name]
        np.testing.assert_array_equal(qw.dequantize(), expected)
        module = tensor.name.removesuffix(".weight")
        own = (parts[f"{module}.{end}"] for end in ("weight", "scales", "biases"))
        on_mlx = mx.dequantize(*own, group_size=qw.scheme.group_size, bits=qw.scheme.bits)
        np.testing.assert_array_equal(np.asarray(on_mlx), expected)


def test_half_precision_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"m.weight": (blocks_of("Q4_1"), "Q4_1")})
    qw = qc.load(path)["m.weight"].astype("float16")
    qc.save({"m.weight": qw}, tmp_path / "out")
    loaded = qc.load(tmp_path / "out")["m.weight"]
    assert loaded.dtype == loaded.biases.dtype == np.float16
    np.testing.assert_array_equal(loaded.dequantize(), qw.dequantize())


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    qc.save({"a": np.ones(2)}, tmp_path / "out")
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "other").st_mode
    assert time.time() - os.stat(tmp_path / "out").st_mtime < 600
