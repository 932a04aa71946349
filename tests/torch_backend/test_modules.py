"""quantcore.torch: quantized layers, and putting them into a model; state_dicts, dtypes, devices, copies, ties."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantcore as qc
from quantcore.torch import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, quantize_module

RULES = {"down": None, nn.Embedding: "affine-int8-g32", "*": "affine-int8-g32"}
TOKENS = torch.tensor([[1, 2, 3], [49, 0, 7]])


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of one shape and dtype, and as near as a product or two in the default precision are."""
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    actual, wanted = actual.detach().double(), wanted.detach().double()
    assert ((actual - wanted) ** 2).sum() <= 2e-8 * (wanted**2).sum()


class Language(nn.Module):
    """A model with every kind of layer that matters: tied, shared, left dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.again = nn.ModuleList([self.up])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.head(self.norm(hidden + self.down(torch.relu(self.up(hidden)))))


@pytest.fixture
def dense() -> Language:
    torch.manual_seed(0)
    return Language().eval()


@pytest.fixture
def model(dense: Language) -> Language:
    quantized = copy.deepcopy(dense)
    quantize_module(quantized, RULES)
    return quantized


# --- replacing ----------------------------------------------------------------------------------------------------


def test_layers_are_replaced_in_place_by_rules(dense: Language) -> None:
    wanted, norm, bias = dense(TOKENS), dense.norm, dense.up.bias
    report = quantize_module(dense, RULES)
    assert isinstance(dense.embed, QuantizedEmbedding)
    assert isinstance(dense.up, QuantizedLinear)
    assert type(dense.down) is nn.Linear
    assert dense.norm is norm
    assert dense.up.bias is bias
    assert dense.again[0] is dense.up
    assert not dense.up.training
    assert [(layer.name, layer.scheme is not None) for layer in report.layers] == [
        ("embed", True), ("up", True), ("down", False), ("head", True),
    ]  # fmt: skip
    assert "by the rule 'down'" in str(report)
    assert "shares its weight with embed" in str(report)
    assert report.bytes_after < report.bytes_before / 1.5
    error = ((dense(TOKENS) - wanted) ** 2).sum() / (wanted**2).sum()
    assert error < 1e-4


def test_a_replaced_layer_computes_what_its_weight_stands_for(model: Language) -> None:
    x = torch.randn(4, 64)
    wanted = nn.functional.linear(x, model.up.weight.dequantize(), model.up.bias)
    close(model.up(x), wanted)
    torch.testing.assert_close(model.embed(TOKENS), model.embed.weight.dequantize()[TOKENS])


def test_tied_weights_stay_tied(model: Language) -> None:
    assert model.head.quantized is model.embed.quantized
    moved = copy.deepcopy(model).to("meta")
    assert moved.head.quantized is moved.embed.quantized
    assert moved.head.quantized.packed.device.type == "meta"


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"nothing.*": "affine-int4-g64", "*": "affine-int4-g32"}, ValueError, "nothing"),
        ({"*": "affine-int4-g32", "up": None}, ValueError, "'up'"),
        ({"*": "affine-int4-g256"}, ValueError, "pad=True"),
        ({"embed": "affine-int8-g32", "head": "affine-int4-g32"}, ValueError, "share their weight"),
        ({"*": "int4"}, ValueError, "affine-int4-g64"),
        ({"*": 4}, TypeError, "Scheme"),
        ({4: "affine-int4-g64"}, TypeError, "pattern"),
        (["*"], TypeError, "mapping"),
    ],
)
def test_bad_rules_change_nothing(dense: Language, rules: Any, error: type[Exception], message: str) -> None:
    before = list(dense.modules())
    with pytest.raises(error, match=message):
        quantize_module(dense, rules)
    assert all(a is b for a, b in zip(dense.modules(), before, strict=True))


def test_a_weight_that_is_not_finite_is_named(dense: Language) -> None:
    with torch.no_grad():
        dense.up.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"up: .*\(3, 5\)"):
        quantize_module(dense, RULES)


def test_what_would_change_meaning_stays_dense() -> None:
    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.Embedding(9, 64, max_norm=1.0), hooked, nn.MultiheadAttention(64, 2))
    notes = [layer.note for layer in quantize_module(model, "affine-int4-g64").layers]
    assert [word in note for word, note in zip(("max_norm", "hooks", "themselves"), notes, strict=True)] == [True] * 3
    with pytest.raises(ValueError, match="from_linear"):
        quantize_module(nn.Linear(64, 64), "affine-int4-g64")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        quantize_module({"a": 1}, "affine-int4-g64")  # type: ignore[arg-type]


def test_torch_s_own_encoder_runs_on_quantized_layers() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    wanted = encoder(x)
    assert sum(layer.scheme is not None for layer in quantize_module(encoder, "affine-int8-g64").layers) == 4
    assert ((encoder(x) - wanted) ** 2).mean() < 1e-4


# --- state_dict, copies, dtypes -----------------------------------------------------------------------------------


def saved(state: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **options)


def test_state_dict_round_trips(model: Language) -> None:
    state = model.state_dict()
    assert {"up.quantized.packed", "up.quantized.scales", "up.quantized.biases", "up.bias"} <= set(state)
    assert state["up.quantized.packed"].dtype == torch.uint32
    other = Language().eval()
    quantize_module(other, RULES)
    assert not torch.equal(other(TOKENS), model(TOKENS))
    assert str(other.load_state_dict(saved(state, weights_only=True), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.head.quantized is other.embed.quantized


def test_a_state_dict_fits_an_empty_layer_only_if_the_scheme_does() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8), "affine-int4-g32")
    empty = QuantizedLinear(64, 8, scheme="affine-int4-g32")
    assert not empty.weight.dequantize().any()
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), layer(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for quantized\.packed"):
        QuantizedLinear(64, 8, scheme="affine-int8-g32").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        empty.load_state_dict(nn.Linear(64, 8).state_dict())


def test_loading_scales_of_another_dtype_loses_nothing() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8), "affine-int4-g32")
    half = QuantizedLinear(64, 8, scheme="affine-int4-g32", dtype=torch.float16)
    half.load_state_dict(layer.state_dict())
    assert torch.equal(half.quantized.scales, layer.quantized.scales)
    assert half.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m, weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(model: Language, again: Callable[[Any], Any]) -> None:
    made = again(model)
    assert torch.equal(made(TOKENS), model(TOKENS))
    assert made.head.quantized is made.embed.quantized
    assert made.up.quantized.packed.data_ptr() != model.up.quantized.packed.data_ptr()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_changes_the_logical_dtype_alone(model: Language, cast: str) -> None:
    wanted = model(TOKENS)
    before = [buffer.clone() for buffer in model.head.quantized.buffers()]
    getattr(model, cast)()
    logical = {"half": torch.float16, "bfloat16": torch.bfloat16}[cast]
    assert model.up.weight.dtype == model.up.bias.dtype == model(TOKENS).dtype == logical
    torch.testing.assert_close(model(TOKENS).float(), wanted, rtol=0.1, atol=0.1)
    model.float()
    assert model.up.weight.dtype == torch.float32
    assert all(map(torch.equal, before, model.head.quantized.buffers()))


def test_double_keeps_the_weight_and_computes_in_float64(model: Language) -> None:
    model.double()
    x = torch.randn(3, 64, dtype=torch.float64)
    wanted = x @ model.up.weight.dequantize().double().mT + model.up.bias
    torch.testing.assert_close(model.up(x), wanted, rtol=1e-12, atol=1e-12)
    assert model.up.quantized.scales.dtype == torch.float32


def test_the_weight_is_no_parameter(model: Language) -> None:
    assert {name for name, _ in model.named_parameters()} == {
        "up.bias",
        "down.weight",
        "down.bias",
        "norm.weight",
        "norm.bias",
    }
    model.requires_grad_(True)
    model(TOKENS).sum().backward()
    assert model.up.bias.grad is not None


def test_repr(model: Language) -> None:
    assert "(50, 64), affine-int8-g32, float32, 10.00 bits/weight" in repr(model)
    assert "in_features=64, out_features=96, bias=True" in repr(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuantizedWeight(qc.quantize(np.ones((2, 64), np.float32))), TypeError, r"to\('torch'\)"),
        (lambda: QuantizedWeight(torch.ones(2, 64)), TypeError, "Tensor"),
        (lambda: QuantizedWeight(qc.quantize(torch.ones(2, 64)).mT), ValueError, "mT"),
        (lambda: QuantizedLinear.from_tensor(qc.quantize(torch.ones(2, 2, 64))), ValueError, "2 axes"),
        (lambda: QuantizedLinear.from_tensor(qc.quantize(torch.ones(2, 64)), torch.ones(3)), ValueError, "bias"),
        (lambda: QuantizedEmbedding.from_embedding(nn.Embedding(2, 64, max_norm=1)), ValueError, "max_norm"),
        (lambda: QuantizedLinear(64, 2)(torch.ones(3, 32)), ValueError, "32"),
        (lambda: QuantizedEmbedding(9, 64)(torch.tensor([9])), IndexError, "9"),
    ],
)
def test_wrong_use(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_tensor_shares_its_memory_with_the_layer() -> None:
    qw = qc.quantize(torch.randn(8, 64))
    layer = QuantizedLinear.from_tensor(qw, torch.zeros(8))
    assert layer.weight.packed.data_ptr() == qw.packed.data_ptr()
    assert isinstance(layer.bias, nn.Parameter)


# --- traces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(model: Language, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).sum().backward()
    functional = torch.compile(lambda x: nn.functional.linear(x, model.up.weight), fullgraph=True, backend=backend)
    x = torch.randn(2, 64)
    close(functional(x), x @ model.up.weight.dequantize().mT)


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: Language, strict: bool) -> None:
    torch._dynamo.reset()
    program = torch.export.export(model, (TOKENS,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if "quantcore" in str(node.target)]
    assert called == ["quantcore.take.default", "quantcore.dot.default", "quantcore.dot.default"]
    close(program.module()(TOKENS), model(TOKENS))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    close(torch.export.load(file).module()(TOKENS), model(TOKENS))


def test_functional_call() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_module(model, "affine-int4-g32")
    x = torch.randn(2, 64)
    doubled = {f"0.quantized.{name}": 2 * getattr(model[0].quantized, name) for name in ("scales", "biases")}
    without_bias = {**doubled, "0.bias": torch.zeros(8)}
    wanted = 2 * (model(x) - model[0].bias)
    close(torch.func.functional_call(model, without_bias, (x,)), wanted)


# --- the door -----------------------------------------------------------------------------------------------------


def test_the_door_lists_what_is_behind_it() -> None:
    assert "QuantizedLinear" in dir(qc.torch)
    with pytest.raises(AttributeError, match="QuantizedLinear"):
        qc.torch.QuantizedConv  # noqa: B018
