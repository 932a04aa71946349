"""What libraries that quantize with torch write is read as they read it themselves, bit for bit in float32.

Each test has the library quantize or pack a layer, saves what it would save, and compares with its own dequantizer. Run
in an environment of its own, where torch is there:

    pip install torch compressed-tensors
    pip install --no-build-isolation hqq autoawq gptqmodel
    pip install -e . pytest pytest-timeout hypothesis safetensors
    pytest -m interop tests/test_interop.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcore as qc

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

IN, OUT, GROUP = 256, 64, 64


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs torch")


@pytest.fixture
def load(tmp_path: Path, torch: Any) -> Callable[[dict[str, Any], dict[str, Any]], qc.Checkpoint]:
    """Save tensors of torch and a config as a checkpoint, and load it."""
    save_file = pytest.importorskip("safetensors.torch").save_file

    def saved(tensors: dict[str, Any], config: dict[str, Any]) -> qc.Checkpoint:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        return qc.load(tmp_path)

    return saved


def same(loaded: qc.QuantizedTensor, expected: Any) -> None:
    dense = loaded.dequantize(dtype="float32")
    # Adding 0 makes -0.0 and 0.0 one: their sign is all that may differ.
    np.testing.assert_array_equal((dense + 0).view(np.uint32), (expected.float().numpy() + 0).view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compressed_tensors(torch: Any, load: Any, bits: int, symmetric: bool, dtype: str) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    half, kind = 1 << (bits - 1), getattr(torch, dtype)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {
        "weight": torch.randn(OUT, IN, dtype=kind),
        "weight_scale": (torch.rand(OUT, IN // GROUP) / half + 0.01).to(kind),
        "weight_zero_point": torch.randint(-half, half, (OUT, IN // GROUP), dtype=torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    compressed = PackedQuantizationCompressor.compress(state, scheme)
    wide = compressed | {"weight_scale": compressed["weight_scale"].float()}
    expected = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    same(load({f"m.{name}": tensor for name, tensor in compressed.items()}, config)["m.weight"], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(torch: Any, load: Any, bits: int, dtype: str) -> None:
    pytest.importorskip("hqq", reason="needs hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    layer = torch.nn.Linear(IN, OUT, bias=False)
    quantized = HQQLinear(layer, config, compute_dtype=getattr(torch, dtype), device="cpu")
    meta = dict(quantized.meta)
    meta |= {"scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
    expected = Quantizer.dequantize(quantized.W_q.data, meta)
    state = {f"m.{name}": tensor for name, tensor in quantized.state_dict().items() if tensor is not None}
    same(load(state, {"quant_method": "hqq"})["m.weight"], expected)


def test_autoawq(torch: Any, load: Any) -> None:
    pytest.importorskip("awq", reason="needs autoawq")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales = (torch.rand(IN // GROUP, OUT) / 8 + 0.01).half()
    zeros = torch.randint(0, 16, (IN // GROUP, OUT))
    codes = torch.randint(0, 16, (IN, OUT))
    spread = [part.repeat_interleave(GROUP, dim=0) for part in (scales, zeros)]
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = ((codes - spread[1]) * spread[0]).T.float()
    quantized = WQLinear_GEMM.from_linear(layer, 4, GROUP, scales=scales, zeros=zeros)
    expected = dequantize_gemm(quantized.qweight, quantized.qzeros, scales.float(), 4, GROUP).T
    state = {f"m.{name}": tensor for name, tensor in quantized.state_dict().items()}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    same(load(state, config)["m.weight"], expected)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel(torch: Any, load: Any, bits: int, version: str) -> None:
    pytest.importorskip("gptqmodel", reason="needs gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scales = (torch.rand(OUT, IN // GROUP) / 8 + 0.01).half().float()
    zeros = torch.randint(1, 1 << bits, (OUT, IN // GROUP))
    codes = torch.randint(0, 1 << bits, (OUT, IN))
    spread = [part.repeat_interleave(GROUP, dim=1) for part in (scales, zeros)]
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = (codes - spread[1]) * spread[0]
    g_idx = torch.arange(IN, dtype=torch.int32) // GROUP
    quantized = TorchLinear(
        bits=bits, group_size=GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=False,
        pack_dtype=torch.int32, dtype=torch.float16,
    )  # fmt: skip
    quantized.pack_block(layer, scales.clone(), zeros.clone(), g_idx)
    quantized.post_init()
    quantized.scales = quantized.scales.float()
    expected = quantized.dequantize_weight().T
    assert torch.equal(expected, layer.weight.data)
    if version == "gptq":
        settings = type("Settings", (), {"bits": bits, "pack_dtype": torch.int32})()
        convert_gptq_v2_to_v1_format_module(quantized, settings)
    state = {f"m.{name}": tensor for name, tensor in quantized.state_dict().items()}
    state["m.scales"] = state["m.scales"].half()
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    same(load(state, config)["m.weight"], expected)
