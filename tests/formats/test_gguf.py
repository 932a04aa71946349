"""GGUF: every type that is read equals gguf-py's own dequantizer, bit for bit in float32; so does the header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES

import quantcore as qc
from quantcore.formats import gguf_blocks
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import products

READ = [kind.name for kind in gguf_blocks.TYPES.values() if kind.scheme is not None]
KNOWN = [kind.name for kind in gguf_blocks.TYPES.values() if kind.scheme is None and kind.dtype is None]
SHAPE = (3, 5, 512)
RNG = np.random.default_rng(0)


def blocks_of(kind: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    """Random blocks of that type, every code and every sub-scale occurring; only the float16 scales are finite."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = RNG.integers(0, 256, (*shape[:-1], shape[-1] // block, nbytes), dtype=np.uint8)
    if kind in ("MXFP4", "NVFP4"):
        scales = rows[..., : 1 if kind == "MXFP4" else 4]
        scales[...] = RNG.integers(0, 254 if kind == "MXFP4" else 128, scales.shape)
        return rows.reshape(*shape[:-1], -1)
    positions = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ2_0": (64,)}
    for at in positions.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1") else (0,)):
        scale = (RNG.standard_normal(rows.shape[:-1]) * 10.0 ** RNG.uniform(-7, 3, rows.shape[:-1])).astype(np.float16)
        rows[..., at : at + 2] = scale[..., None].view(np.uint8)
    return rows.reshape(*shape[:-1], -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray[Any, Any], str | None]], **pairs: Any) -> Path:
    """A GGUF file by gguf-py's writer; a tensor is an array and, for raw blocks, the name of its type."""
    writer = GGUFWriter(path, "llama")
    for key, value in pairs.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind is None else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", READ)
def test_type_equals_the_reference_bit_for_bit(tmp_path: Path, kind: str) -> None:
    blocks = blocks_of(kind)
    path = write(tmp_path / "a.gguf", {"w": (blocks, kind), "b": (np.arange(4, dtype=np.float32), None)})
    loaded = qc.load(path)["w"]
    expected = quants.dequantize(blocks, GGMLQuantizationType[kind])
    assert isinstance(loaded, qc.QuantizedTensor)
    assert loaded.shape == SHAPE
    assert loaded.dtype == np.float32
    dense = loaded.dequantize()
    # Adding 0 makes -0.0 and 0.0 one: their sign is all that may differ.
    np.testing.assert_array_equal((dense + 0).view(np.uint32), (expected + 0).view(np.uint32))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_large_scales_keep_their_biases(tmp_path: Path, kind: str) -> None:
    blocks = blocks_of(kind, (2, 64))
    blocks.reshape(4, -1)[:, :2] = np.array([60000, -9000, 513, 1], np.float16)[:, None].view(np.uint8)
    loaded = qc.load(write(tmp_path / "a.gguf", {"w": (blocks, kind)}))["w"]
    assert loaded.biases.dtype == np.float32
    np.testing.assert_array_equal(loaded.dequantize(), quants.dequantize(blocks, GGMLQuantizationType[kind]))


def test_half_precision_biases_where_they_fit(tmp_path: Path) -> None:
    loaded = qc.load(write(tmp_path / "a.gguf", {"w": (blocks_of("Q4_0"), "Q4_0")}))["w"]
    assert loaded.scales.dtype == loaded.biases.dtype == np.float16


@pytest.mark.parametrize(("kind", "zero_point"), [("Q4_0", 8), ("Q8_0", 128), ("Q4_1", 0)])
def test_products_know_the_zero_point_of_symmetric_types(tmp_path: Path, kind: str, zero_point: int) -> None:
    dense = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"w.weight": (quants.quantize(dense, GGMLQuantizationType[kind]), kind)})
    read = qc.load(path)
    qc.save({"w.weight": read["w.weight"].astype("float16")}, tmp_path / "saved")
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    for checkpoint in (read, qc.load(tmp_path / "saved")):
        qw = checkpoint["w.weight"]
        assert [leaf.flags.writeable for leaf in (qw.scales, qw.biases)] == [False, False]
        result = qc.dot(x, qw)
        assert products._weights[id(qw)][1].zero_point == zero_point
        exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, 256)
        truth = oracle.product(x, exact)
        assert oracle.nmse(result - truth, truth, x, exact) <= 1e-6  # half precision's in the second


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_vector_comes_dense(tmp_path: Path, kind: str) -> None:
    blocks = blocks_of(kind, (512,))
    checkpoint = qc.load(write(tmp_path / "a.gguf", {"w": (blocks, kind)}))
    assert checkpoint.entries["w"].scheme is None
    np.testing.assert_array_equal(checkpoint["w"], quants.dequantize(blocks, GGMLQuantizationType[kind]))


def test_dense_types_are_views_of_the_file(tmp_path: Path) -> None:
    values = RNG.standard_normal((4, 6)).astype(np.float32)
    half = values.astype(ml_dtypes.bfloat16)
    tensors = {
        "f32": (values, None),
        "f16": (values.astype(np.float16), None),
        "bf16": (half.view(np.uint8), "BF16"),
        "i32": (np.arange(5, dtype=np.int32), None),
    }
    checkpoint = qc.load(write(tmp_path / "a.gguf", tensors))
    np.testing.assert_array_equal(checkpoint["f32"], values)
    np.testing.assert_array_equal(checkpoint["f16"], values.astype(np.float16))
    np.testing.assert_array_equal(checkpoint["bf16"], half)
    np.testing.assert_array_equal(checkpoint["i32"], np.arange(5))
    for name in tensors:
        assert not checkpoint[name].flags.writeable
        assert not checkpoint[name].flags.owndata
    assert checkpoint["f32"].shape == (4, 6)


@pytest.mark.parametrize(("kind", "byte"), [("MXFP4", 255), ("NVFP4", 128), ("NVFP4", 200), ("NVFP4", 255)])
def test_a_microscaled_scale_that_is_no_number(tmp_path: Path, kind: str, byte: int) -> None:
    blocks = blocks_of(kind, (3, 128))
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks[1, nbytes] = byte
    checkpoint = qc.load(write(tmp_path / "a.gguf", {"w": (blocks, kind)}))
    with pytest.raises(qc.FormatError, match=r"tensor 'w', byte \d+: a scale isn't finite"):
        checkpoint["w"]


@pytest.mark.parametrize("kind", KNOWN)
def test_types_without_a_scheme_are_listed_and_refused_by_name(tmp_path: Path, kind: str) -> None:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = np.zeros((2, nbytes), np.uint8)
    checkpoint = qc.load(write(tmp_path / "a.gguf", {"w": (data, kind), "b": (np.ones(3, np.float32), None)}))
    assert checkpoint.entries["w"].shape == (2, block)
    assert checkpoint.entries["w"].kind == kind
    with pytest.raises(qc.UnsupportedError, match=rf"tensor 'w', byte \d+: {kind} isn't read"):
        checkpoint["w"]
    np.testing.assert_array_equal(checkpoint["b"], np.ones(3))


def test_sizes_of_all_types_are_those_of_gguf_py() -> None:
    assert {c: (k.block, k.nbytes) for c, k in gguf_blocks.TYPES.items()} == {
        kind.value: GGML_QUANT_SIZES[kind] for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES
    }


def test_metadata_as_gguf_py_reads_it(tmp_path: Path) -> None:
    words = ["", "a", "Ġthe", "日本"] * 3
    path = write(tmp_path / "a.gguf", {"w": (np.ones(3, np.float32), None)}, words=words, ids=[1, -2], name="n")
    metadata = qc.load(path).metadata
    fields = GGUFReader(path).fields
    assert set(metadata) == {key for key in fields if not key.startswith("GGUF.")}
    assert list(metadata["words"]) == words
    assert metadata["words"][1:3] == words[1:3]
    assert metadata["words"][-1] == "日本"
    assert metadata["ids"].tolist() == [1, -2]
    assert metadata["name"] == "n"
    assert metadata["general.architecture"] == "llama"


def test_format_is_found_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": (np.ones(3, np.float32), None)})
    assert qc.load(path).format == "gguf"


def test_what_was_read_can_be_read_again(tmp_path: Path) -> None:
    """Reading gives the file's memory back; its views, and what is read once more, are the same."""
    blocks = blocks_of("Q4_K", (256, 4096))
    dense = RNG.standard_normal((64, 1024)).astype(np.float32)
    checkpoint = qc.load(write(tmp_path / "a.gguf", {"d": (dense, None), "w": (blocks, "Q4_K"), "e": (dense, None)}))
    view = checkpoint["e"]
    first = checkpoint["w"]
    for again in (checkpoint["w"], checkpoint["w"]):
        np.testing.assert_array_equal(again.packed, first.packed)
        np.testing.assert_array_equal(again.scales, first.scales)
    np.testing.assert_array_equal(view, dense)
    np.testing.assert_array_equal(checkpoint["d"], dense)
