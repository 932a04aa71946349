"""Who multiplies x by a packed weight on a CPU: quantcore and its peers, each with the weight in the form it wants.

All hold the same weight, ``(code - z) * scale``, where the zero point z is ``2**(bits - 1)``, as MatMulNBits has it
without being given any, or each group's own. Only the int8 kernel of torch, which has one scale a row, holds another
one, and is measured against that.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import quantcore
from quantcore.memory import aligned_empty, freeze
from quantcore.testing import oracle

Array: TypeAlias = np.ndarray[Any, Any]

FMA, SHORT_DOT, BYTE_DOT, BFLOAT16 = "float32 fma", "16-bit dot", "8-bit dot", "bfloat16"
DEFAULT, FAST, HIGHEST = "quantcore default", "quantcore fast", "quantcore highest"
NUMPY, TORCH, TORCH_BFLOAT16 = "numpy dense float32", "torch dense float32", "torch dense bfloat16"
MLX, ORT_0, ORT_4 = "mlx quantized_matmul", "onnxruntime MatMulNBits 0", "onnxruntime MatMulNBits 4"
TORCH_INT4, TORCH_INT4_BFLOAT16 = "torch int4pack float32", "torch int4pack bfloat16"
TORCH_INT8, TORCH_INT8_BFLOAT16 = "torch int8pack float32", "torch int8pack bfloat16"

TRUTH_OUTPUTS, TRUTH_ROWS = 256, 8
"""Outputs and rows of x, evenly spaced, whose error is looked at: float64 products of all would take minutes."""


class Candidate(NamedTuple):
    """One way to compute the product.

    Attributes
    ----------
    name : str
    arithmetic : str
        What it multiplies with, which gives its roofline.
    weight_bytes : int
        Bytes of the weight in the form that it reads.
    bind : callable
        From x, float32 of NumPy, makes a call without arguments that computes the product. Converting x isn't timed.
    numpy : callable
        A result as an array of NumPy.
    exact : callable
        Some rows of the weight that it holds, in float64.
    """

    name: str
    arithmetic: str
    weight_bytes: int
    bind: Callable[[Array], Callable[[], Any]]
    numpy: Callable[[Any], Array]
    exact: Callable[[Array], Array]


class Weight:
    """A random weight: any codes, positive scales; the middle code stands for zero, or of each group a code of its own.

    Its arrays lie as those that quantize() makes do, and are read-only as those of a checkpoint are.

    Attributes
    ----------
    shape : tuple of int
        (N, K).
    tensor : quantcore.QuantizedTensor
    packed, scales, biases : array
        What `tensor` holds.
    zero_points : array or None
        Shape (N, K / group), uint8, where each group has its own.
    """

    def __init__(
        self, shape: tuple[int, int], bits: int, group: int, rng: np.random.Generator, *, own_zeros: bool = False
    ) -> None:
        self.shape, self.bits, self.group = shape, bits, group
        rows, columns = shape
        self.packed = _aligned(rng.integers(0, 1 << 32, (rows, columns * bits // 32), np.uint32))
        self.scales = _aligned(rng.uniform(0.005, 0.015, (rows, columns // group)).astype(np.float32))
        self.zero_points = rng.integers(0, 1 << bits, self.scales.shape, np.uint8) if own_zeros else None
        zeros = np.float32(1 << (bits - 1)) if self.zero_points is None else self.zero_points.astype(np.float32)
        self.biases = _aligned(-zeros * self.scales)
        freeze(self.scales)
        freeze(self.biases)
        scheme = quantcore.Scheme(bits=bits, group_size=group)
        self.tensor = quantcore.quantized_tensor(self.packed, self.scales, self.biases, shape, scheme)
        self._dense: Array | None = None

    def dense(self) -> Array:
        """The weight in float32, shape (N, K); NumPy's and torch's products share it."""
        if self._dense is None:
            self._dense = quantcore.dequantize(self.tensor)
        return self._dense

    def codes(self) -> Array:
        """The codes of 4 or 8 bits, shape (N, K), uint8."""
        octets = self.packed.astype("<u4", copy=False).view(np.uint8)
        if self.bits == 8:
            return octets
        return np.stack([octets & 15, octets >> 4], axis=-1).reshape(self.shape)

    def exact(self, rows: Array) -> Array:
        """Some of its rows in float64."""
        parts = (part[rows] for part in (self.packed, self.scales, self.biases))
        return oracle.exact_weight(*parts, self.tensor.scheme, self.shape[1])


def _aligned(array: Array) -> Array:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def error(candidate: Candidate, result: Any, x: Array, outputs: int) -> float:
    """NMSE of the worst of some rows of x, over some of the outputs; NaN if the result isn't finite or its shape wrong.

    Both parts of a row's denominator are over the same outputs as its error, so it estimates that of the whole row.
    """
    found = candidate.numpy(result)
    rows = np.unique(np.linspace(0, x.shape[0] - 1, TRUTH_ROWS).astype(int))
    columns = np.unique(np.linspace(0, outputs - 1, TRUTH_OUTPUTS).astype(int))
    if found.shape != (x.shape[0], outputs) or not np.isfinite(found).all():
        return float("nan")
    w = candidate.exact(columns)
    truth = oracle.product(x[rows], w)
    return oracle.nmse(found[np.ix_(rows, columns)].astype(np.float64) - truth, truth, x[rows], w)


def candidates(weight: Weight, threads: int) -> tuple[list[Candidate], dict[str, str]]:
    """All that can compute with a weight, and why the others can't."""
    found, missing = [], {}
    makers: dict[str, Callable[[Weight, int], list[Candidate]]] = {
        "quantcore": _quantcore,
        NUMPY: _numpy,
        "torch dense": _torch_dense,
        "torch int4pack": _torch_int4,
        "torch int8pack": _torch_int8,
        MLX: _mlx,
        ORT_0: lambda w, n: _onnxruntime(w, n, ORT_0, FMA, 0),
        ORT_4: lambda w, n: _onnxruntime(w, n, ORT_4, BYTE_DOT, 4),
    }
    for name, make in makers.items():
        try:
            found += make(weight, threads)
        except ImportError as problem:
            missing[name] = f"not installed: {problem}"
        except NotImplementedError as problem:
            missing[name] = str(problem)
        except Exception as problem:  # a peer's own refusal, of whatever kind: the others are measured all the same
            missing[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return found, missing


def _quantcore(weight: Weight, threads: int) -> list[Candidate]:
    from quantcore_backends.cpu_kernels import integer
    from quantcore_backends.cpu_kernels.zero_points import common_zero_point

    scheme = weight.tensor.scheme
    wide = SHORT_DOT if integer.serves(scheme) else FMA
    arithmetic = {"default": wide, "fast": wide, "highest": FMA}
    if wide == SHORT_DOT and integer.has_byte_dot(scheme):
        arithmetic["fast"] = BYTE_DOT
    size = weight.packed.nbytes + weight.scales.nbytes
    read = dict.fromkeys(arithmetic, size + weight.biases.nbytes)
    if integer.serves(scheme) and common_zero_point(weight.scales, weight.biases):
        read |= {"default": size, "fast": size}

    def bind(precision: str) -> Callable[[Array], Callable[[], Any]]:
        return lambda x: lambda: quantcore.dot(x, weight.tensor, precision=precision)

    names = {"default": DEFAULT, "fast": FAST, "highest": HIGHEST}
    return [
        Candidate(name, arithmetic[precision], read[precision], bind(precision), np.asarray, weight.exact)
        for precision, name in names.items()
    ]


def _numpy(weight: Weight, threads: int) -> list[Candidate]:
    dense = weight.dense().T
    return [Candidate(NUMPY, FMA, dense.nbytes, lambda x: lambda: x @ dense, np.asarray, weight.exact)]


def _torch(threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return torch


def _torch_numpy(result: Any) -> Array:
    return np.asarray(result.float().numpy())


def _torch_dense(weight: Weight, threads: int) -> list[Candidate]:
    torch = _torch(threads)
    linear = torch.nn.functional.linear
    dense = torch.from_numpy(weight.dense())

    def bind(w: Any) -> Callable[[Array], Callable[[], Any]]:
        def bound(x: Array) -> Callable[[], Any]:
            its = torch.from_numpy(x).to(w.dtype)
            return lambda: linear(its, w)

        return bound

    return [
        Candidate(name, arithmetic, w.nbytes, bind(w), _torch_numpy, weight.exact)
        for name, arithmetic, w in ((TORCH, FMA, dense), (TORCH_BFLOAT16, BFLOAT16, dense.bfloat16()))
    ]


def _torch_int4(weight: Weight, threads: int) -> list[Candidate]:
    """Its kernel computes ``(code - 8) * scale + zero`` in float32, for scales and zeros of x's dtype."""
    torch = _torch(threads)
    if weight.bits != 4:
        raise NotImplementedError(f"4 bits only, not {weight.bits}")
    codes = torch.from_numpy(weight.codes().astype(np.int32))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.from_numpy(weight.scales.T.copy())
    zeros = torch.zeros_like(scales)
    if weight.zero_points is not None:
        zeros = (8 - torch.from_numpy(weight.zero_points.T.astype(np.float32))) * scales
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def made(name: str, dtype: Any) -> Candidate:
        both = torch.stack([scales, zeros], -1).to(dtype).contiguous()

        def bind(x: Array) -> Callable[[], Any]:
            its = torch.from_numpy(x).to(dtype)
            return lambda: multiply(its, packed, weight.group, both)

        return Candidate(name, FMA, packed.nbytes + both.nbytes, bind, _torch_numpy, weight.exact)

    return [made(TORCH_INT4, torch.float32), made(TORCH_INT4_BFLOAT16, torch.bfloat16)]


def _torch_int8(weight: Weight, threads: int) -> list[Candidate]:
    """Its kernel multiplies signed codes with x in float32, and has one scale a row."""
    torch = _torch(threads)
    if weight.bits != 8:
        raise NotImplementedError(f"8 bits only, not {weight.bits}")
    if weight.zero_points is not None:
        raise NotImplementedError("it has no zero points")
    signed = (weight.codes() ^ 0x80).view(np.int8)
    codes = torch.from_numpy(signed)
    scales = weight.scales[:, 0].copy()

    def exact(rows: Array) -> Array:
        return signed[rows].astype(np.float64) * scales[rows, None].astype(np.float64)

    def made(name: str, dtype: Any) -> Candidate:
        its_scales = torch.from_numpy(scales).to(dtype)

        def bind(x: Array) -> Callable[[], Any]:
            its = torch.from_numpy(x).to(dtype)
            return lambda: torch._weight_int8pack_mm(its, codes, its_scales)

        return Candidate(name, FMA, codes.nbytes + its_scales.nbytes, bind, _torch_numpy, exact)

    return [made(TORCH_INT8, torch.float32), made(TORCH_INT8_BFLOAT16, torch.bfloat16)]


def _mlx(weight: Weight, threads: int) -> list[Candidate]:
    """MLX on a CPU has no threads to set: `quantized_matmul` runs in one."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    leaves = [mx.array(part) for part in (weight.packed, weight.scales, weight.biases)]
    mx.eval(*leaves)
    options = {"group_size": weight.group, "bits": weight.bits, "transpose": True}

    def bind(x: Array) -> Callable[[], Any]:
        its = mx.array(x)
        mx.eval(its)

        def compute() -> Any:
            result = mx.quantized_matmul(its, *leaves, **options)
            mx.eval(result)
            return result

        return compute

    return [Candidate(MLX, FMA, sum(leaf.nbytes for leaf in leaves), bind, np.asarray, weight.exact)]


def _onnxruntime(weight: Weight, threads: int, name: str, arithmetic: str, level: int) -> list[Candidate]:
    """A model of one node, its input and output bound beforehand. Level 0 computes in float32, 4 rounds x to int8."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    octets = weight.packed.astype("<u4", copy=False).view(np.uint8)
    initial = {
        "B": octets.reshape(rows, columns // weight.group, weight.group * weight.bits // 8),
        "scales": weight.scales,
    }
    if weight.zero_points is not None:
        initial["zero_points"] = _packed_rows(weight.zero_points, weight.bits)
    node = helper.make_node(
        "MatMulNBits",
        ["A", *initial],
        ["Y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=weight.bits,
        block_size=weight.group,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", rows])],
        [numpy_helper.from_array(array, key) for key, array in initial.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bind(x: Array) -> Callable[[], Any]:
        its = ort.OrtValue.ortvalue_from_numpy(x)
        binding = session.io_binding()
        binding.bind_ortvalue_input("A", its)
        binding.bind_output("Y", "cpu")

        def compute() -> Any:
            session.run_with_iobinding(binding)
            return binding

        return compute

    size = sum(array.nbytes for array in initial.values())
    return [Candidate(name, arithmetic, size, bind, lambda r: r.copy_outputs_to_cpu()[0], weight.exact)]


def _packed_rows(values: Array, bits: int) -> Array:
    """Rows of unsigned integers of 2, 4 or 8 bits as bytes, the first in the lowest bits."""
    each = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % each)))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(padded.reshape(len(values), -1, each) << shifts, axis=-1)


def versions() -> dict[str, str]:
    """Versions of the peers and of what compiles quantcore's kernels, or that they aren't installed."""
    found = {}
    for package in ("torch", "onnxruntime", "onnx", "mlx", "mlx-cpu", "numba", "llvmlite"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
