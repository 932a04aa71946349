"""MatMulNBits: a weight read from a model is what ONNX Runtime multiplies by, and what its contract says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import makers
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import quantcore as qc
from quantcore import Scheme

Array = np.ndarray[Any, Any]


class Weight:
    """Random codes for MatMulNBits, with scales of few bits, so that all is exact."""

    def __init__(
        self, bits: int, out: int, in_features: int, block: int, zeros: str, scale_type: Any = np.float32
    ) -> None:
        rng = np.random.default_rng(bits)
        self.bits, self.block, self.shape = bits, block, (out, in_features)
        self.blocks = -(-in_features // block)
        codes = rng.integers(0, 1 << bits, (out, self.blocks * block))  # what pads the last block is random, too
        points = (
            rng.integers(0, 1 << bits, (out, self.blocks))
            if zeros != "default"
            else np.full((out, self.blocks), 1 << (bits - 1))
        )
        self.scales = makers.random_scales(rng, points.shape, np.float16).astype(scale_type)
        self.codes = makers.stream(codes, bits).view(np.uint8)[:, : self.blocks * block * bits // 8]
        self.codes = self.codes.reshape(out, self.blocks, -1)
        self.zeros = {
            "default": None,
            "packed": makers.stream(points, bits).view(np.uint8)[:, : -(-self.blocks * bits // 8)],
            "float": points.astype(scale_type),
        }[zeros]
        self.dense = makers.affine(codes, points, self.scales, block)[:, :in_features]


def model(weight: Weight, **changes: Any) -> onnx.ModelProto:
    arrays = {"w_Q": weight.codes, "w_scales": weight.scales.reshape(-1)}
    if weight.zeros is not None:
        arrays["w_zero_points"] = weight.zeros.reshape(-1)
    arrays["other"] = np.arange(3, dtype=np.int64)
    out, in_features = weight.shape
    attributes = {"K": in_features, "N": out, "bits": weight.bits, "block_size": weight.block} | changes
    inputs = ["x", *(name for name in arrays if name != "other")]
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(weight.scales.dtype)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [None, in_features])],
        [helper.make_tensor_value_info("y", kind, [None, out])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


CASES = [
    (4, 16, 128, 32, "default"),
    (4, 16, 128, 32, "packed"),
    (4, 16, 128, 32, "float"),
    (4, 8, 96, 32, "packed"),  # an odd number of blocks: half a byte of zero points is unused
    (4, 8, 100, 32, "packed"),  # the last block is padded
    (8, 8, 128, 64, "packed"),
    (8, 8, 77, 16, "default"),
    (2, 8, 128, 64, "packed"),
    (2, 8, 90, 16, "default"),
    (4, 8, 512, 256, "packed"),
]


@pytest.mark.parametrize(("bits", "out", "in_features", "block", "zeros"), CASES)
def test_weight_follows_the_contract(
    tmp_path: Path, bits: int, out: int, in_features: int, block: int, zeros: str
) -> None:
    weight = Weight(bits, out, in_features, block, zeros)
    onnx.save(model(weight), tmp_path / "m.bin")
    checkpoint = qc.load(tmp_path / "m.bin")
    assert checkpoint.format == "onnx"
    assert set(checkpoint) == {"w_Q", "other"}
    np.testing.assert_array_equal(checkpoint["other"], np.arange(3))
    loaded = checkpoint["w_Q"]
    assert loaded.scheme is checkpoint.entries["w_Q"].scheme is Scheme(bits=bits, group_size=block)
    assert loaded.shape == (out, in_features)
    np.testing.assert_array_equal(loaded.dequantize() + 0, weight.dense + 0)
    spare = loaded.packed.shape[1] * 32 - in_features * bits
    assert not (loaded.packed[:, -1] >> np.uint32(32 - spare)).any() or not spare


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != 2 and case[4] != "float"])
def test_weight_is_what_onnx_runtime_multiplies_by(tmp_path: Path, case: Any) -> None:
    weight = Weight(*case)
    made = model(weight)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float32)})
    onnx.save(made, tmp_path / "m.onnx")
    np.testing.assert_array_equal(product.T + 0, qc.load(tmp_path)["w_Q"].dequantize() + 0)


def test_half_precision(tmp_path: Path) -> None:
    weight = Weight(4, 8, 128, 32, "packed", np.float16)
    onnx.save(model(weight), tmp_path / "m.onnx")
    loaded = qc.load(tmp_path)["w_Q"]
    assert loaded.dtype == np.float16
    np.testing.assert_array_equal(loaded.dequantize(), weight.dense.astype(np.float16))


def test_wide_scales_are_inexact_and_say_so(tmp_path: Path) -> None:
    weight = Weight(4, 8, 128, 32, "packed")
    weight.scales = np.random.default_rng(0).standard_normal(weight.scales.shape).astype(np.float32)
    onnx.save(model(weight), tmp_path / "m.onnx")
    with pytest.raises(qc.InexactConversionError, match=r"\d+ of 1024 values would differ"):
        qc.load(tmp_path)["w_Q"]
    assert qc.load(tmp_path, exact=False)["w_Q"].shape == (8, 128)


def test_data_in_a_file_of_its_own(tmp_path: Path) -> None:
    weight = Weight(4, 16, 128, 32, "packed")
    onnx.save(model(weight), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    np.testing.assert_array_equal(qc.load(tmp_path)["w_Q"].dequantize() + 0, weight.dense + 0)


@pytest.mark.parametrize("location", ["../m.data", "/etc/passwd", "a/b", "", "..", "a\\b"])
def test_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    made = model(Weight(4, 16, 128, 32, "packed"))
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(qc.FormatError, match=r"tensor 'w_Q', byte \d+: its data is in .* isn't a file name"):
        qc.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"K": 256}, r"'w_Q', byte \d+: uint8 of shape \(16, 4, 16\); expected 2048 uint8"),
        ({"K": 0}, "K = 0"),
        ({"bits": 3}, "3 bits"),
        ({"block_size": -32}, "blocks of -32"),
        ({"N": 1 << 62}, "expected"),
    ],
)
def test_attributes_that_do_not_fit(tmp_path: Path, changes: dict[str, int], why: str) -> None:
    onnx.save(model(Weight(4, 16, 128, 32, "packed"), **changes), tmp_path / "m.onnx")
    with pytest.raises(qc.FormatError, match=why):
        qc.load(tmp_path)


def test_initialisers_that_are_not_read(tmp_path: Path) -> None:
    made = model(Weight(4, 16, 128, 32, "packed"))
    made.graph.initializer.append(helper.make_tensor("typed", TensorProto.INT64, [2], [1, 2]))
    made.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], ["a"]))
    made.graph.initializer.append(helper.make_tensor("floats", TensorProto.FLOAT, [2], [1.0, 2.0]))
    onnx.save(made, tmp_path / "m.onnx")
    checkpoint = qc.load(tmp_path)
    assert checkpoint["floats"].tolist() == [1, 2]
    for name, why in (("typed", "INT64 outside raw_data"), ("words", "type 8")):
        with pytest.raises(qc.UnsupportedError, match=why):
            checkpoint[name]
