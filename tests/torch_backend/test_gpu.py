"""The torch backend on a CUDA GPU, where the weight is dense one tile at a time. Run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import quantcore as qc
from quantcore.testing import oracle
from quantcore.torch import QuantizedLinear, quantize_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((96, 512)).astype(np.float32)


@pytest.fixture(params=[False, True], ids=["float32", "TF32 allowed"])
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("precision", oracle.BOUNDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_keep_their_bounds(bits: int, precision: str, transposed: bool, dtype: str) -> None:
    qn = qc.quantize(WEIGHT, bits=bits)
    exact = oracle.exact_weight(qn.packed, qn.scales, qn.biases, qn.scheme, 512)
    qw = qn.to("torch", "cuda")
    w, qw = (exact.T, qw.mT) if transposed else (exact, qw)
    x = torch.from_numpy(RNG.standard_normal((7, w.shape[1])).astype(np.float32)).to(getattr(torch, dtype))
    y = qc.dot(x.cuda(), qw, out_dtype="float32", precision=precision)
    assert y.device.type == "cuda"
    given = x.float().numpy()
    wanted = oracle.product(given, w)
    assert oracle.nmse(y.double().cpu().numpy() - wanted, wanted, given, w) <= oracle.BOUNDS[precision]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_encoding_and_decoding_are_the_reference_s(bits: int) -> None:
    qn, qg = qc.quantize(WEIGHT, bits=bits), qc.quantize(torch.from_numpy(WEIGHT).cuda(), bits=bits)
    for ours, theirs in zip(qg.to("numpy").flatten()[0], qn.flatten()[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(qg.dequantize().cpu().numpy(), qn.dequantize())


def test_an_index_out_of_range_is_nan_and_no_device_assert() -> None:
    qg = qc.quantize(torch.from_numpy(WEIGHT).cuda())
    rows = qc.take(qg, torch.tensor([1, 96, -97, -1], device="cuda"))
    assert torch.isnan(rows).all(dim=1).tolist() == [False, True, True, False]
    stack = qc.quantize(torch.from_numpy(WEIGHT.reshape(3, 32, 512)).cuda())
    chosen = torch.tensor([0, 3], device="cuda")
    product = qc.gather_dot(torch.ones(2, 1, 512, device="cuda"), stack, rhs_indices=chosen)
    assert torch.isnan(product).all(dim=(1, 2)).tolist() == [False, True]
    torch.cuda.synchronize()


def test_operands_on_two_devices_are_refused() -> None:
    qg = qc.quantize(torch.from_numpy(WEIGHT).cuda())
    with pytest.raises(TypeError, match="devices"):
        qc.dot(torch.ones(2, 512), qg)


def test_gradient_compile_and_autocast() -> None:
    qg = qc.quantize(torch.from_numpy(WEIGHT).cuda())
    x = torch.randn(3, 512, device="cuda", requires_grad=True)
    (gradient,) = torch.autograd.grad(qc.dot(x, qg).sum(), x)
    torch.testing.assert_close(gradient, qg.dequantize().sum(dim=0).expand(3, 512), rtol=1e-4, atol=1e-3)
    compiled = torch.compile(lambda x: torch.tanh(qc.dot(x, qg)), fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.tanh(qc.dot(x, qg)))
    with torch.autocast("cuda", dtype=torch.float16):
        torch.testing.assert_close(qc.dot(x, qg), x @ qg.dequantize().mT, rtol=1e-2, atol=1e-1, check_dtype=False)
        assert qc.dot(x, qg).dtype == torch.float32


def test_a_model_moves_there_and_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.Linear(64, 8))
    quantize_module(model, "affine-int4-g32")
    x = torch.randn(2, 512)
    wanted = model(x)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert isinstance(model[0], QuantizedLinear)
    torch.testing.assert_close(model.cpu()(x), wanted)
