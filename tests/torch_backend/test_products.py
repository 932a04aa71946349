"""torch tensors in and out: functions of torch's own, gradients, transforms, traces, devices, pickling."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import compiled
from quantcore_backends.torch_backend import cpu, matmul, tiles

torch.manual_seed(0)
WEIGHT = qc.quantize(torch.randn(24, 64), bits=4, group_size=32)
DENSE = WEIGHT.dequantize().double()
STACK = qc.quantize(torch.randn(4, 24, 64), bits=3, group_size=32)
DENSE_STACK = STACK.dequantize().double()
X = torch.randn(3, 64)
FULL = {"fullgraph": True, "backend": "aot_eager"}


def close(actual: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-8) -> None:
    """Of one shape, and within an NMSE of one another: that of the default precision unless said otherwise."""
    assert actual.shape == wanted.shape
    actual, wanted = actual.detach().double(), wanted.detach().double()
    assert ((actual - wanted) ** 2).sum() <= bound * (wanted**2).sum()


# --- torch's own functions ----------------------------------------------------------------------------------------

BIAS = torch.randn(24)
FUNCTIONS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
    "x @ qw.mT": (lambda: X @ WEIGHT.mT, lambda: X @ DENSE.float().mT),
    "qw @ x": (lambda: WEIGHT @ X.mT, lambda: DENSE.float() @ X.mT),
    "matmul": (lambda: torch.matmul(X, WEIGHT.mT), lambda: X @ DENSE.float().mT),
    "matmul, weight left": (lambda: torch.matmul(WEIGHT, X.mT), lambda: DENSE.float() @ X.mT),
    "mm": (lambda: torch.mm(X, WEIGHT.mT), lambda: X @ DENSE.float().mT),
    "bmm": (lambda: torch.bmm(X.expand(4, 3, 64), STACK.mT), lambda: X.expand(4, 3, 64) @ DENSE_STACK.float().mT),
    "addmm": (
        lambda: torch.addmm(BIAS, X, WEIGHT.mT, beta=2, alpha=0.5),
        lambda: torch.addmm(BIAS, X, DENSE.float().mT, beta=2, alpha=0.5),
    ),
    "linear": (lambda: F.linear(X, WEIGHT), lambda: F.linear(X, DENSE.float())),
    "linear, bias": (lambda: F.linear(X, WEIGHT, BIAS), lambda: F.linear(X, DENSE.float(), BIAS)),
    "embedding": (
        lambda: F.embedding(torch.tensor([[1, 23]]), WEIGHT, padding_idx=1),
        lambda: DENSE.float()[torch.tensor([[1, 23]])],
    ),
    "tensordot": (
        lambda: torch.tensordot(X, WEIGHT, dims=([1], [1])),
        lambda: torch.tensordot(X, DENSE.float(), dims=([1], [1])),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_a_quantized_tensor(name: str) -> None:
    quantized, dense = FUNCTIONS[name]
    close(quantized(), dense())
    close(torch.compile(quantized, **FULL)(), dense())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: torch.add(X, WEIGHT), TypeError, "dequantize"),
        (lambda: X + WEIGHT, TypeError, "unsupported operand"),
        (lambda: F.embedding_bag(torch.tensor([[1]]), WEIGHT), TypeError, "dequantize"),
        (lambda: torch.mm(X[None], WEIGHT.mT), ValueError, "2 axes"),
        (lambda: F.embedding(torch.tensor([1]), WEIGHT, max_norm=1.0), TypeError, "max_norm"),
        (lambda: torch.matmul(X, WEIGHT), ValueError, "mT"),
        (lambda: qc.take(WEIGHT, torch.tensor([24])), IndexError, "24"),
        (lambda: qc.dot(X.int(), WEIGHT), TypeError, "int32"),
        (lambda: qc.dot(X.to("meta"), WEIGHT), TypeError, "meta"),
        (lambda: qc.dot(X.numpy(), WEIGHT), TypeError, r"to\('numpy'\)"),
    ],
)
def test_wrong_use(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _operator(x: Any = X, packed: Any = None, scales: Any = None, in_features: int = 64, **options: Any) -> Any:
    """``torch.ops.quantcore.dot`` on parts of WEIGHT, as nothing else calls it."""
    packed, scales = WEIGHT.packed if packed is None else packed, WEIGHT.scales if scales is None else scales
    rest = {"scheme": str(WEIGHT.scheme), "transposed": False, "dtype": "float32", "precision": "default"} | options
    return torch.ops.quantcore.dot(x, packed, scales, scales, in_features=in_features, **rest)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _operator(X[:, :32]), "don't fit"),
        (lambda: _operator(torch.zeros(3, 24), transposed=True, in_features=32), "make no weight"),
        (lambda: _operator(torch.zeros(3, 4096), in_features=4096), r"make no weight of shape \(24, 4096\)"),
        (lambda: _operator(scales=WEIGHT.scales[:10]), r"\(10, 2\)"),
        (lambda: _operator(packed=WEIGHT.packed.view(torch.int32)), "int32"),
        (lambda: _operator(scales=WEIGHT.packed[:, :2].view(torch.int32)), "floating"),
        (lambda: _operator(precision="high"), "'high'"),
        (lambda: torch.ops.quantcore.dequantize(*OPERANDS, "affine-int4-g32", 640, "float32"), "make no weight"),
        (
            lambda: torch.ops.quantcore.take(*OPERANDS, torch.tensor([1]), "affine-int8-g32", 64, 0, "float32"),
            "make no weight",
        ),
    ],
)
def test_operators_called_directly_read_no_memory_that_is_not_theirs(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- gradients and transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["default", "highest"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_x_against_float64(transposed: bool, precision: Any) -> None:
    qw, dense = (WEIGHT.mT, DENSE.mT) if transposed else (WEIGHT, DENSE)
    x = torch.randn(5, dense.shape[1], requires_grad=True)
    v = torch.randn(5, dense.shape[0])
    (gradient,) = torch.autograd.grad(qc.dot(x, qw, precision=precision), x, v)
    wanted = (v.double() @ dense).numpy()
    error = oracle.nmse(gradient.double().numpy() - wanted, wanted, v.numpy(), dense.mT.numpy())
    assert error <= oracle.BOUNDS[precision]


CALLS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "dot": (lambda x: qc.dot(x, WEIGHT), (2, 64)),
    "1-D": (lambda x: qc.dot(x, WEIGHT), (64,)),
    "transposed": (lambda x: qc.dot(x, WEIGHT.mT), (2, 24)),
    "broadcast": (lambda x: qc.dot(x, STACK), (2, 64)),
    "gather_dot": (lambda x: qc.gather_dot(x, STACK, torch.tensor([0, 1, -2]), torch.tensor([2, 3, -1])), (2, 2, 64)),
    "tensordot": (lambda x: qc.tensordot(x, WEIGHT, axes=([0], [1])), (64, 2)),
    "weight left": (lambda x: qc.matmul(WEIGHT, x), (64, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_first_and_second_order_by_differences(name: str) -> None:
    function, shape = CALLS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,), fast_mode=name == "gather_dot")
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_half_precision_gradient() -> None:
    x = X.half().requires_grad_()
    (gradient,) = torch.autograd.grad(qc.dot(x, WEIGHT).sum(), x)
    assert gradient.dtype == torch.float16
    close(gradient, DENSE.sum(0).expand(3, 64), 1e-5)


@pytest.mark.parametrize("call", [lambda q: qc.dot(X, q), lambda q: q.dequantize()], ids=["dot", "dequantize"])
def test_a_gradient_of_the_weight_is_refused(call: Callable[[Any], torch.Tensor]) -> None:
    leaves, rebuild = WEIGHT.flatten()
    trained = rebuild([leaves[0], leaves[1].clone().requires_grad_(), leaves[2]])
    with pytest.raises(NotImplementedError, match="detach"):
        call(trained).sum().backward()


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]] = {
    "vmap": lambda f: torch.func.vmap(f)(X),
    "vmap of vmap": lambda f: torch.func.vmap(torch.func.vmap(f))(X.expand(2, 3, 64)),
    "grad": lambda f: torch.func.grad(lambda x: (f(x) ** 2).sum())(X),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: (f(x) ** 2).sum()))(X),
    "grad of vmap": lambda f: torch.func.grad(lambda x: (torch.func.vmap(f)(x) ** 2).sum())(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X + 1,))[1],
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "hessian": lambda f: torch.func.hessian(lambda x: (f(x) ** 2).sum())(X[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    wanted = TRANSFORMS[name](lambda x: x @ DENSE.float().mT)
    close(TRANSFORMS[name](lambda x: qc.dot(x, WEIGHT)), wanted, 1e-7)


def test_vmap_over_the_weight() -> None:
    x = torch.randn(4, 3, 64)
    close(torch.func.vmap(qc.dot)(x, STACK), x @ DENSE_STACK.float().mT)
    close(torch.func.vmap(qc.dot)(x[:, 0], STACK), (x[:, :1] @ DENSE_STACK.float().mT)[:, 0])
    close(torch.func.vmap(qc.dot, in_dims=(None, 0))(X, STACK), X @ DENSE_STACK.float().mT)
    close(torch.func.vmap(lambda x: qc.dot(x, STACK))(X[:, None]), X[:, None, None] @ DENSE_STACK.float().mT)
    close(torch.func.vmap(lambda q: q.dequantize())(STACK), DENSE_STACK, 0)
    indices = torch.tensor([[1, 2], [3, 4]])
    close(torch.func.vmap(lambda i: qc.take(WEIGHT, i))(indices), DENSE[indices], 0)
    close(
        torch.func.vmap(lambda q, i: qc.take(q, i))(STACK[:2], indices),
        torch.stack([DENSE_STACK[0][indices[0]], DENSE_STACK[1][indices[1]]]),
        0,
    )


def test_forward_mode() -> None:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(qc.dot(forward_ad.make_dual(X, X + 1), WEIGHT)).tangent
    close(tangent, (X + 1) @ DENSE.float().mT)


# --- traces -------------------------------------------------------------------------------------------------------


class Closed(torch.nn.Module):
    """A module that holds a tensor as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.qw = WEIGHT

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(qc.dot(x, self.qw))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    wanted = torch.tanh(X @ DENSE.float().mT)
    x = X.clone().requires_grad_()
    for function in (
        Closed(),
        lambda x: torch.tanh(qc.dot(x, WEIGHT)),
        lambda x: torch.tanh(qc.array_namespace(x).matmul(x, WEIGHT.mT)),
    ):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        close(compiled(X), wanted)
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        close(gradient, (1 - wanted**2) @ DENSE.float(), 1e-6)
    as_input = torch.compile(lambda x, q: torch.tanh(qc.dot(x, q)), fullgraph=True, backend=backend)
    close(as_input(X, WEIGHT), wanted)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, np.float32])
def test_compile_a_change_of_dtype(dtype: Any) -> None:
    def function(x: torch.Tensor, qw: qc.QuantizedTensor) -> torch.Tensor:
        return qc.dot(x.half(), qw.astype(dtype))

    result = torch.compile(function, **FULL)(X, WEIGHT)
    expected = function(X, WEIGHT)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


def test_a_compiled_function_is_compiled_once_a_shape_and_scheme() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, q: qc.dot(x, q), fullgraph=True, backend=counter)
    other = qc.quantize(torch.randn(24, 64), bits=4, group_size=32)
    for x, qw in ((X, WEIGHT), (X + 1, WEIGHT), (X, other), (X, WEIGHT)):
        close(compiled(x, qw), x @ qw.dequantize().mT)
    assert counter.frame_count == 1
    eight = qc.quantize(torch.randn(24, 64), bits=8)
    close(compiled(X, eight), X @ eight.dequantize().mT)
    assert counter.frame_count == 2


def test_only_the_operator_is_left_in_the_graph() -> None:
    graph = make_fx(lambda x: qc.dot(x, WEIGHT))(X)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.quantcore.dot.default]


def test_explain_says_why_a_path_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU without Numba, and on other devices: here meta's, whose tensors have no values."""
    leaves, rebuild = WEIGHT.flatten()
    elsewhere = rebuild([leaf.to("meta") for leaf in leaves])
    assert "torch: computes it: our compiled CPU kernels" in str(qc.explain("dot", X, WEIGHT))
    assert "kernels are for CPUs, not meta" in str(qc.explain("dot", X.to("meta"), elsewhere))
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert "in NumPy alone, more slowly: Numba" in str(qc.explain("dot", X, WEIGHT))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """Strictly as well, which is by Dynamo."""
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Closed(), (X,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["quantcore.dot.default", "aten.tanh.default"]
    more = torch.randn(7, 64)
    close(program.module()(more), torch.tanh(more @ DENSE.float().mT))


class Open(torch.nn.Module):
    """A function of x and weights."""

    def forward(self, x: torch.Tensor, qw: qc.QuantizedTensor, stack: qc.QuantizedTensor) -> torch.Tensor:
        experts = qc.gather_dot(x[None], stack, rhs_indices=torch.tensor([3, 1]))
        return qc.dot(x, qw, precision="highest") + experts[1] + qc.take(qw, [2, 0]).sum()


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_weights_as_inputs(strict: bool) -> None:
    torch._dynamo.reset()
    program = torch.export.export(Open(), (X, WEIGHT, STACK), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if "quantcore" in str(node.target)]
    assert called == ["quantcore.gather_dot.default", "quantcore.dot.default", "quantcore.take.default"]
    other = qc.quantize(torch.randn(24, 64), bits=4, group_size=32)
    wanted = X @ (other.dequantize() + STACK.dequantize()[1]).mT + other.dequantize()[[2, 0]].sum()
    close(program.module()(X, other, STACK), wanted)


def test_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: qc.dot(x, WEIGHT), dynamic=True, **FULL)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 64)
        close(compiled(x), x @ DENSE.float().mT)


def test_precision_is_part_of_the_trace() -> None:
    torch._dynamo.reset()
    with qc.use_precision("highest"):
        graph = make_fx(lambda x: qc.dot(x, WEIGHT))(X)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert node.args[-1] == "highest"


def test_jit_trace_keeps_the_operator() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, about jit itself
        traced = torch.jit.trace(lambda x: qc.dot(x, WEIGHT), (X,), check_trace=False)
    close(traced(2 * X), 2 * X @ DENSE.float().mT)


STACKED = (STACK.packed, STACK.scales, STACK.biases)
OPERANDS = (WEIGHT.packed, WEIGHT.scales, WEIGHT.biases)
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "quantize": [(torch.randn(4, 64), "affine-int3-g32"), (torch.randn(2, 3, 50).half(), "affine-int8-row")],
    "dequantize": [(*OPERANDS, "affine-int4-g32", 64, "bfloat16")],
    "take": [(*OPERANDS, torch.tensor([[1, -1]]), "affine-int4-g32", 64, 0, "float32")],
    "dot": [
        (X.clone().requires_grad_(), *OPERANDS, "affine-int4-g32", 64, False, "float32", "default"),
        (torch.randn(24).half(), *OPERANDS, "affine-int4-g32", 64, True, "float16", "highest"),
        (torch.randn(2, 1, 3, 64), *STACKED, "affine-int3-g32", 64, False, "float64", "default"),
    ],
    "gather_dot": [
        (
            torch.randn(2, 3, 64, requires_grad=True), *STACKED, torch.tensor([[0], [1]]), torch.tensor([3, 1]),
            "affine-int3-g32", 64, False, "float32", "default",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_pass_opcheck(name: str) -> None:
    for sample in SAMPLES[name]:
        torch.library.opcheck(getattr(torch.ops.quantcore, name).default, sample)


# --- memory -------------------------------------------------------------------------------------------------------


def test_moving_shares_memory() -> None:
    for dtype in (np.float32, np.float16):
        qn = qc.quantize(np.random.default_rng(0).standard_normal((8, 64)).astype(dtype))
        qt = qn.to("torch")
        assert [leaf.data_ptr() for leaf in qt.flatten()[0]] == [leaf.ctypes.data for leaf in qn.flatten()[0]]
        back = qt.to("numpy")
        assert all(
            a is not b and np.shares_memory(a, b) for a, b in zip(back.flatten()[0], qn.flatten()[0], strict=True)
        )
    bf16 = WEIGHT.flatten()[1]([WEIGHT.packed, WEIGHT.scales.bfloat16(), WEIGHT.biases.bfloat16()]).to("numpy")
    assert bf16.scales.dtype.name == "bfloat16"
    assert bf16.to("torch").scales.dtype == torch.bfloat16


def test_read_only_memory_is_copied() -> None:
    array = np.ones((2, 64), np.float32)
    array.flags.writeable = False
    moved = qc.to_library(array, "torch")
    moved[0] = 0
    assert array.all()


@pytest.mark.parametrize("change", ["in place", "data", "shared memory", "strided"])
def test_a_weight_is_read_where_it_lies_now(change: str) -> None:
    other = qc.quantize(torch.randn(24, 64), bits=4, group_size=32)
    leaves, rebuild = WEIGHT.flatten()
    leaves = [leaf.clone() for leaf in leaves]
    qw = rebuild(leaves)
    close(qc.dot(X, qw), X @ DENSE.float().mT)
    for leaf, new in zip(leaves, other.flatten()[0], strict=True):
        if change == "data":
            leaf.data = new.clone()
        elif change == "strided":
            leaf.data = torch.stack([new, torch.zeros_like(new)], -1)[..., 0]
        else:
            leaf.copy_(new)
        if change == "shared memory":
            leaf.share_memory_()
    close(qc.dot(X, qw), X @ other.dequantize().mT)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (600, 64)])
def test_leading_axes_of_x(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    for each in (x, x.flip(0), torch.randn(*shape[:-1], 128)[..., ::2]):
        close(qc.dot(each, WEIGHT), each @ DENSE.float().mT)


def test_views_of_a_product_share_nothing_with_x() -> None:
    x = X.clone()
    y = qc.dot(x, WEIGHT)
    before = y.clone()
    x.zero_()
    assert torch.equal(y, before)
    assert y.is_contiguous()


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), lambda q: _saved(q)],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_copies(again: Callable[[Any], Any], transposed: bool) -> None:
    qw = WEIGHT.mT if transposed else WEIGHT
    made = again(qw)
    assert (made.scheme, made.shape, made.annotation) == (qw.scheme, qw.shape, qw.annotation)
    assert torch.equal(made.dequantize(), qw.dequantize())


def _saved(qw: qc.QuantizedTensor) -> Any:
    file = io.BytesIO()
    torch.save(qw, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_neg_and_conj_views_and_inference_mode() -> None:
    x = torch.complex(X, -X).conj().imag
    assert x.is_neg()
    close(qc.dot(x, WEIGHT), X @ DENSE.float().mT)
    with torch.inference_mode():
        close(qc.dot(X, WEIGHT), X @ DENSE.float().mT)


def test_autocast_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qc.dot(X, WEIGHT)
        tiled = tiles.dot(X, *OPERANDS, "affine-int4-g32", 64, False, "float32", "default")
    assert y.dtype == torch.float32
    close(y, X @ DENSE.float().mT)
    close(tiled, X @ DENSE.float().mT)


def test_on_the_meta_device() -> None:
    leaves, rebuild = WEIGHT.flatten()
    qw = rebuild([leaf.to("meta") for leaf in leaves])
    assert qc.dot(X.to("meta"), qw).shape == (3, 24)
    assert qc.quantize(torch.empty(8, 64, device="meta")).shape == (8, 64)


# --- tiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def precision_setting() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_tiles_keep_their_bounds_whatever_the_user_lets_torch_round(setting: str, precision_setting: Any) -> None:
    torch.set_float32_matmul_precision(setting)
    assert matmul.may_round("cpu") is (setting != "highest")
    qw = qc.quantize(torch.randn(40, 1024))
    x = torch.randn(6, 1024)
    x[1, 3] = torch.inf
    x[2, 3] = 3.4e38
    wanted = oracle.product(
        x.numpy(), oracle.exact_weight(*(leaf.numpy() for leaf in qw.flatten()[0]), qw.scheme, 1024)
    )
    for precision, bound in oracle.BOUNDS.items():
        y = tiles.dot(x, *qw.flatten()[0], str(qw.scheme), 1024, False, "float32", precision)
        rows = [0, 3, 4, 5]
        dense = qw.dequantize().double().numpy()
        error = oracle.nmse(y[rows].double().numpy() - wanted[rows], wanted[rows], x[rows].numpy(), dense)
        assert error <= bound
        assert not torch.isfinite(y[1]).any()
        assert not torch.isnan(y[2]).any()
    assert torch.get_float32_matmul_precision() == setting


def test_a_split_product_is_within_its_bound() -> None:
    x, w = torch.randn(8, 2048), torch.randn(2048, 16)
    (x_high, x_low), (w_high, w_low) = matmul._split(x), matmul._split(w)
    assert torch.equal(x_high.bfloat16().float(), x_high)
    exact = x.double() @ w.double()
    kept = x_high.double() @ w_high.double() + x_high.double() @ w_low.double() + x_low.double() @ w_high.double()
    error = ((kept - exact) ** 2).sum(1) / (exact**2).sum(1)
    assert error.max() < 1e-9


def test_tiles_are_smaller_than_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(tiles, "TILE", 4096)
    plain = tiles._tile
    monkeypatch.setattr(tiles, "_tile", lambda *a: made.append((t := plain(*a)).numel()) or t)
    qw = qc.quantize(torch.randn(3, 100, 512), bits=3, group_size=64)
    x = torch.randn(5, 512)
    for transposed in (False, True):
        used = qw.mT if transposed else qw
        x = torch.randn(5, used.shape[-1])
        y = tiles.dot(x, *qw.flatten()[0], str(qw.scheme), 512, transposed, "float32", "default")
        close(y, x @ used.dequantize().mT)
    assert len(made) > 10
    assert max(made) <= 4096


def test_tiles_encode_as_the_kernels_do() -> None:
    for bits in (1, 2, 3, 4, 5, 6, 8):
        w = torch.randn(17, 150) * 3
        for scheme in (f"affine-int{bits}-g32", f"affine-int{bits}-row"):
            for ours, theirs in zip(tiles.quantize(w, scheme), cpu.quantize(w, scheme), strict=True):
                assert torch.equal(ours, theirs)


# --- processes and threads ----------------------------------------------------------------------------------------

FIRST_IN_A_TRACE = """
import torch, quantcore as qc
{make}
y = torch.compile(lambda x: qc.dot(x, qw), fullgraph=True, backend="eager")(torch.ones(2, 64))
assert y.shape == (2, 4), y.shape
print("ok")
"""
MAKERS = {
    "constructor": (
        "z = torch.zeros(4, 1)\nqw = qc.QuantizedTensor(torch.zeros(4, 8, dtype=torch.uint32), z, z, qc.Scheme(), 64)"
    ),
    "layer": "from quantcore.torch import QuantizedLinear\nqw = QuantizedLinear(64, 4).weight",
}


@pytest.mark.parametrize("how", MAKERS)
def test_the_first_product_of_a_process_may_be_compiled(how: str) -> None:
    script = FIRST_IN_A_TRACE.format(make=MAKERS[how])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stdout == "ok\n", done.stderr


def test_threads_compile_and_multiply_at_once() -> None:
    torch._dynamo.reset()
    wanted = X @ DENSE.float().mT
    raised: list[BaseException] = []

    def work() -> None:
        try:
            compiled = torch.compile(lambda x: qc.dot(x, WEIGHT), **FULL)
            for _ in range(5):
                close(compiled(X), wanted)
                close(qc.dot(X, WEIGHT), wanted)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised


def test_looking_for_backends_anew_leaves_torch_as_it_is() -> None:
    """What torch was told at the first use can't be told it twice."""
    qc.refresh()
    close(qc.dot(X, WEIGHT), X @ DENSE.float().mT)
    assert torch.equal(WEIGHT.to("numpy").to("torch").dequantize(), WEIGHT.dequantize())


def test_scales_that_are_views_of_their_negatives() -> None:
    qw = qc.quantize(torch.randn(16, 128, generator=torch.Generator().manual_seed(0)))
    negative = [torch._neg_view(-leaf) for leaf in (qw.scales, qw.biases)]
    same = qc.quantized_tensor(qw.packed, *negative, qw.shape, qw.scheme)
    x = torch.ones(2, 128)
    torch.testing.assert_close(qc.dot(x, same), qc.dot(x, qw))
