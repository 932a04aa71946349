"""Plain safetensors: one file, shards with and without an index; as the safetensors library writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcore as qc

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "half": RNG.standard_normal((2, 3, 4)).astype(np.float16),
    "bf": RNG.standard_normal(7).astype(ml_dtypes.bfloat16),
    "f64": RNG.standard_normal((2, 2)),
    "mask": np.array([[True], [False]]),
    "bytes": np.arange(3, dtype=np.uint8),
    "words": np.arange(4, dtype=np.uint32),
    "longs": np.arange(4, dtype=np.int64),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def same(checkpoint: qc.Checkpoint, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert set(checkpoint) == set(expected)
    for name, array in expected.items():
        assert checkpoint[name].dtype == array.dtype
        assert checkpoint[name].shape == array.shape
        assert checkpoint[name].tobytes() == array.tobytes()
        entry = checkpoint.entries[name]
        assert (entry.shape, entry.nbytes, entry.scheme) == (array.shape, array.nbytes, None)


def test_every_dtype(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "named.anything", metadata={"who": "me"})
    checkpoint = qc.load(tmp_path / "named.anything")
    same(checkpoint, TENSORS)
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"who": "me"}
    assert checkpoint.nbytes == sum(array.nbytes for array in TENSORS.values())
    assert "10 tensors" in repr(checkpoint)


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a.weight"]}, tmp_path / "model.safetensors")
    array = qc.load(tmp_path / "model.safetensors")["a"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_folder_with_an_index(tmp_path: Path) -> None:
    names = list(TENSORS)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, its in shards.items():
        save_file({name: TENSORS[name] for name in its}, tmp_path / file)
    save_file({"unrelated": TENSORS["half"]}, tmp_path / "adapters.safetensors")
    index = {"weight_map": {name: file for file, its in shards.items() for name in its}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = qc.load(tmp_path)
    same(checkpoint, TENSORS)
    assert checkpoint.config == {"model_type": "llama"}


def test_folder_without_an_index(tmp_path: Path) -> None:
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[:5]}, tmp_path / "a.safetensors")
    save_file({name: TENSORS[name] for name in names[5:]}, tmp_path / "b.safetensors")
    same(qc.load(tmp_path), TENSORS)


def test_rename(tmp_path: Path) -> None:
    save_file({"a.weight": TENSORS["a.weight"], "half": TENSORS["half"]}, tmp_path / "m.safetensors")
    assert list(qc.load(tmp_path, rename={"half": "h"})) == ["a.weight", "h"]
    assert list(qc.load(tmp_path, rename=lambda name: "model." + name)) == ["model.a.weight", "model.half"]
    with pytest.raises(ValueError, match=r"rename gives 'x' for both 'a\.weight' and 'half'"):
        qc.load(tmp_path, rename=lambda name: "x")
    with pytest.raises(TypeError, match=r"rename gives NoneType for 'a\.weight'"):
        qc.load(tmp_path, rename=lambda name: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="mapping or a function"):
        qc.load(tmp_path, rename=3)  # type: ignore[arg-type]


def test_to_another_library(tmp_path: Path) -> None:
    import mlx.core as mx

    save_file({"a": TENSORS["a.weight"], "b": TENSORS["bf"]}, tmp_path / "m.safetensors")
    checkpoint = qc.load(tmp_path, library="mlx")
    assert isinstance(checkpoint["a"], mx.array)
    assert checkpoint["b"].dtype == mx.bfloat16
    np.testing.assert_array_equal(np.asarray(checkpoint["a"]), TENSORS["a.weight"])


def test_looking_up(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a.weight"]}, tmp_path / "m.safetensors")
    checkpoint = qc.load(tmp_path)
    assert "a" in checkpoint
    assert "b" not in checkpoint
    with pytest.raises(KeyError, match="b"):
        checkpoint["b"]
    with pytest.raises(FileNotFoundError):
        qc.load(tmp_path / "missing")


def test_importing_quantcore_reads_no_format() -> None:
    code = (
        "import quantcore, sys; assert not any(m.startswith('quantcore.formats') for m in sys.modules); quantcore.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
