"""AWQ, GPTQ, HQQ and compressed-tensors: what is loaded equals ``(code - zero) * scale`` bit for bit in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest
import safetensors.numpy
from makers import BFLOAT16, Made

import quantcore as qc


def load_and_compare(folder: Path, made: Made, format: str, **options: Any) -> qc.Checkpoint:
    checkpoint = qc.load(makers.write(folder, made), **options)
    assert checkpoint.format == format
    for name, expected in made.weights.items():
        loaded = checkpoint[name]
        assert isinstance(loaded, qc.QuantizedTensor)
        assert loaded.shape == expected.shape == checkpoint.entries[name].shape
        assert loaded.scheme is checkpoint.entries[name].scheme
        dense = loaded.dequantize(dtype="float32")
        # Adding 0 makes -0.0 and 0.0 one: their sign is all that may differ.
        np.testing.assert_array_equal((dense + 0).view(np.uint32), (expected + 0).view(np.uint32))
        if made.tensors.get("m.scales", np.zeros(0)).dtype == np.float16:
            np.testing.assert_array_equal(loaded.dequantize(), expected.astype(np.float16))
    return checkpoint


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("group", [32, 128])
def test_awq(tmp_path: Path, group: int, dtype: Any) -> None:
    checkpoint = load_and_compare(tmp_path, makers.awq(group=group, dtype=dtype), "awq")
    order = list(safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    parts = ("m.qweight", "m.qzeros", "m.scales")
    assert list(checkpoint) == list(dict.fromkeys("m.weight" if name in parts else name for name in order))
    assert checkpoint["m.weight"].biases.dtype == np.float32
    assert checkpoint["m.weight"].dtype == dtype
    assert checkpoint.nbytes == sum(entry.nbytes for entry in checkpoint.entries.values())


def test_awq_of_one_group_a_row(tmp_path: Path) -> None:
    made = makers.awq(in_features=96, group=96)
    made.config["quantization_config"]["group_size"] = -1
    assert load_and_compare(tmp_path, made, "awq")["m.weight"].scheme == qc.Scheme(bits=4, group_size=None)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, version: str) -> None:
    load_and_compare(tmp_path, makers.gptq(bits=bits, version=version), "gptq")


def test_gptq_without_a_version_is_the_first(tmp_path: Path) -> None:
    made = makers.gptq()
    del made.config["quantization_config"]["checkpoint_format"], made.tensors["m.g_idx"]
    load_and_compare(tmp_path, made, "gptq")


def test_gptq_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    made = makers.gptq()
    own = {key: value for key, value in made.config.pop("quantization_config").items() if key != "quant_method"}
    makers.write(tmp_path, made)
    (tmp_path / "quantize_config.json").write_text(makers.json.dumps(own))
    np.testing.assert_array_equal(qc.load(tmp_path)["m.weight"].dequantize(dtype="float32"), made.weights["m.weight"])


def test_gptq_with_modules_of_their_own(tmp_path: Path) -> None:
    made, other = makers.gptq(bits=4), makers.gptq(bits=8, group=64)
    made.tensors.update({name.replace("m.", "n."): tensor for name, tensor in other.tensors.items()})
    made.weights["n.weight"] = other.weights["m.weight"]
    with pytest.raises(qc.FormatError, match=r"m\.qweight|n\.qweight.*config says 4 and 32"):
        qc.load(makers.write(tmp_path, made))
    made.config["quantization_config"]["dynamic"] = {"+:n": {"bits": 8, "group_size": 64}}
    load_and_compare(tmp_path, made, "gptq")


def test_gptq_first_version_with_an_ambiguous_zero(tmp_path: Path) -> None:
    made = makers.gptq()
    made.tensors["m.qzeros"] = np.full_like(made.tensors["m.qzeros"], -1)
    with pytest.raises(qc.FormatError, match=r"tensor 'm.qzeros', byte \d+: zero point \(0, 0\) is stored as 15"):
        qc.load(makers.write(tmp_path, made))["m.weight"]
    made.config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    qc.load(makers.write(tmp_path, made))["m.weight"]


def test_gptq_with_another_order_is_refused(tmp_path: Path) -> None:
    made = makers.gptq()
    made.tensors["m.g_idx"] = made.tensors["m.g_idx"][::-1]
    with pytest.raises(qc.UnsupportedError, match=r"m\.g_idx.*desc_act"):
        qc.load(makers.write(tmp_path, made))["m.weight"]


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(tmp_path: Path, bits: int, dtype: Any) -> None:
    checkpoint = load_and_compare(tmp_path, makers.hqq(bits=bits, dtype=dtype), "hqq")
    assert list(checkpoint) == ["m.weight"]


def test_hqq_with_codes_viewed_as_floats(tmp_path: Path) -> None:
    made = makers.hqq()
    made.tensors["m.W_q"] = made.tensors["m.W_q"].view(np.float16)
    made.tensors["m.view_as_float"] = np.array(1, np.uint8)
    load_and_compare(tmp_path, made, "hqq")


def test_hqq_without_a_config(tmp_path: Path) -> None:
    load_and_compare(tmp_path, makers.hqq()._replace(config={}), "hqq")


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [("axis", 0, "along axis 0 are strided"), ("quant_zero", 1, "quant_zero=True"), ("quant_scale", 1, "quant_scale")],
)
def test_hqq_kinds_that_are_refused(tmp_path: Path, part: str, value: int, why: str) -> None:
    made = makers.hqq()
    made.tensors[f"m.{part}"] = np.array(value, np.int32)
    with pytest.raises(qc.UnsupportedError, match=why):
        qc.load(makers.write(tmp_path, made))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_compressed_tensors(tmp_path: Path, bits: int, dense: bool, symmetric: bool) -> None:
    made = makers.compressed_tensors(bits=bits, dense=dense, symmetric=symmetric)
    load_and_compare(tmp_path, made, "compressed-tensors")


def test_compressed_tensors_by_channel(tmp_path: Path) -> None:
    made = makers.compressed_tensors(group=None, in_features=100)
    assert load_and_compare(tmp_path, made, "compressed-tensors")["m.weight"].scheme.group_size is None


def test_compressed_tensors_with_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    made = makers.compressed_tensors(dense=False)
    codes = np.stack([made.tensors["m.weight_zero_point"].T.view(np.uint32) >> (4 * i) & 15 for i in range(8)], axis=-1)
    made.tensors["m.weight_zero_point"] = (codes.reshape(2, -1)[:, :20].T.astype(np.int16) - 8).astype(np.int8)
    load_and_compare(tmp_path, made, "compressed-tensors")


def test_compressed_tensors_whose_packing_cannot_be_told(tmp_path: Path) -> None:
    made = makers.compressed_tensors(bits=3, in_features=16, group=16)
    with pytest.raises(qc.UnsupportedError, match="can't be told apart"):
        qc.load(makers.write(tmp_path, made))


@pytest.mark.parametrize(
    ("maker", "changes", "why"),
    [
        (makers.awq, {"version": "gemv"}, "version 'gemv'"),
        (makers.awq, {"bits": 8}, "AWQ of 8 bits"),
        (makers.gptq, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (makers.awq, {"group_size": 48}, "groups of 48 aren't supported"),
        (makers.compressed_tensors, {"format": "float-quantized"}, "format 'float-quantized'"),
        (makers.awq, {"quant_method": "bitsandbytes"}, "quantization method 'bitsandbytes' isn't read"),
        (makers.awq, {"quant_method": "fp8"}, "quantization method 'fp8' isn't read"),
    ],
)
def test_kinds_that_are_refused_by_name(tmp_path: Path, maker: Any, changes: dict[str, Any], why: str) -> None:
    made = maker()
    made.config["quantization_config"].update(changes)
    with pytest.raises(qc.UnsupportedError, match=why):
        qc.load(makers.write(tmp_path, made))


@pytest.mark.parametrize("maker", [makers.awq, makers.gptq, makers.compressed_tensors, makers.mlx])
def test_quantized_tensors_that_nothing_describes(tmp_path: Path, maker: Any) -> None:
    with pytest.raises(qc.FormatError, match=r"but no config\.json beside it says how"):
        qc.load(makers.write(tmp_path, maker()._replace(config={})))


@pytest.mark.parametrize("said", [makers.gptq, makers.awq])
def test_quantized_tensors_that_the_config_does_not_describe(tmp_path: Path, said: Any) -> None:
    method = said().config["quantization_config"]["quant_method"]
    with pytest.raises(qc.FormatError, match=f"'m.scales'.* part of a quantized weight, but the config says {method}"):
        qc.load(makers.write(tmp_path, makers.mlx()._replace(config=said().config)))


@pytest.mark.parametrize("maker", [makers.awq, makers.gptq, makers.hqq, makers.compressed_tensors])
def test_wide_scales_are_inexact_and_say_so(tmp_path: Path, maker: Any) -> None:
    made = maker(dtype=np.float32)
    makers.write(tmp_path, made)
    with pytest.raises(qc.InexactConversionError, match=r"\d+ of \d+ values would differ .* pass exact=False"):
        qc.load(tmp_path)["m.weight"]
    loaded = qc.load(tmp_path, exact=False)["m.weight"].dequantize()
    largest = np.abs(made.weights["m.weight"]).max()
    assert 0 < np.abs(loaded - made.weights["m.weight"]).max() < largest * 2.0**-22


def test_wide_scales_that_hold_few_bits_are_exact(tmp_path: Path) -> None:
    made = makers.gptq()
    made.tensors["m.scales"] = made.tensors["m.scales"].astype(np.float32)
    load_and_compare(tmp_path, made, "gptq")


@pytest.mark.parametrize("maker", [makers.awq, makers.gptq, makers.compressed_tensors])
def test_nan_scales_name_the_byte(tmp_path: Path, maker: Any) -> None:
    made = maker()
    name = next(name for name in made.tensors if "scale" in name)
    made.tensors[name] = np.ascontiguousarray(made.tensors[name])
    made.tensors[name][1, 1] = np.nan
    checkpoint = qc.load(makers.write(tmp_path, made))
    with pytest.raises(qc.FormatError, match=rf"{name}', byte \d+: a scale or bias is nan") as caught:
        checkpoint["m.weight"]
    offset = int(str(caught.value).partition("byte ")[2].partition(":")[0])
    found = np.frombuffer((tmp_path / "model.safetensors").read_bytes()[offset : offset + 2], made.tensors[name].dtype)
    assert np.isnan(found.astype(np.float32)).all()
