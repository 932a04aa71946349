"""What is refused, by which exception, in which words: one table.

A message names the operation, the shapes, the scheme where there is one, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_strict as strict
import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import quantcore as qc
from quantcore.cli import app

W = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
STACK = np.random.default_rng(2).standard_normal((2, 8, 64)).astype(np.float32)
QW = qc.quantize(W, bits=4, group_size=32)
QS = qc.quantize(STACK, bits=4, group_size=32)
NAME = "affine-int4-g32"

STRICT = QW.to("array_api_strict")
FAR = strict.Device("device1")
ELSEWHERE = QW.to("array_api_strict", FAR)
MLX = QW.to("mlx")
BAD = W.copy()
BAD[2, 5] = np.nan
HUGE = np.zeros((2, 64), np.float16)
HUGE[1, 0], HUGE[1, 1] = 65504, -65504


def with_inf(values: Any, *position: int) -> Any:
    changed = values.copy()
    changed[position] = np.inf
    return changed


def parts(**change: Any) -> Callable[[], Any]:
    """quantized_tensor of QW's own arrays, with some arguments changed."""
    given = {"packed": QW.packed, "scales": QW.scales, "biases": QW.biases, "shape": (8, 64), "scheme": NAME} | change
    dtype = given.pop("dtype", None)
    return lambda: qc.quantized_tensor(*given.values(), dtype=dtype)


class Case(NamedTuple):
    id: str
    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def case(id: str, call: Callable[[], Any], error: type[Exception], *words: str) -> Case:
    return Case(id, call, error, words)


CASES = [
    # --- quantize: the weight
    case(
        "quantize int weight",
        lambda: qc.quantize(W.astype(np.int32)),
        TypeError,
        "quantize",
        "int32",
        "cast",
        "float32",
    ),
    case("quantize bool weight", lambda: qc.quantize(W > 0), TypeError, "quantize", "bool", "cast"),
    case("quantize complex weight", lambda: qc.quantize(W.astype(np.complex64)), TypeError, "quantize", "complex64"),
    case("quantize list", lambda: qc.quantize([[1.0] * 64]), TypeError, "quantize", "array", "list"),
    case("quantize None", lambda: qc.quantize(None), TypeError, "quantize", "array", "NoneType"),
    case("quantize quantized", lambda: qc.quantize(QW), TypeError, "quantize", "already", NAME, "dequantize"),
    case("quantize vector", lambda: qc.quantize(W[0]), ValueError, "quantize", "2 axes", "(64,)"),
    case("quantize scalar", lambda: qc.quantize(np.float32(1)), ValueError, "quantize", "2 axes", "()"),
    case("quantize no features", lambda: qc.quantize(W[:, :0]), ValueError, "quantize", "(8, 0)", "empty"),
    case(
        "quantize no features along -2", lambda: qc.quantize(W[:0], axis=-2), ValueError, "quantize", "(0, 64)", "empty"
    ),
    case(
        "quantize ragged",
        lambda: qc.quantize(W[:, :60], group_size=32),
        ValueError,
        "quantize",
        "60",
        "(8, 60)",
        "32",
        NAME,
        "pad=True",
    ),
    case(
        "quantize ragged along -2",
        lambda: qc.quantize(W, group_size=16, axis=-2),
        ValueError,
        "quantize",
        "8 elements",
        "(8, 64)",
        "affine-int4-g16",
        "pad=True",
    ),
    case(
        "quantize NaN", lambda: qc.quantize(BAD, group_size=32), ValueError, "quantize", "nan", "(2, 5)", NAME, "clip"
    ),
    case(
        "quantize NaN along -2",
        lambda: qc.quantize(BAD.T.copy(), group_size=32, axis=-2),
        ValueError,
        "quantize",
        "nan",
        "(5, 2)",
        "clip",
    ),
    case(
        "quantize inf in a stack",
        lambda: qc.quantize(with_inf(STACK, 1, 3, 4), group_size=32),
        ValueError,
        "quantize",
        "inf",
        "(1, 3, 4)",
        "clip",
    ),
    case(
        "quantize -inf in MLX", lambda: qc.quantize(mx.array(-1 / (W - W[0, 1])), group_size=32), ValueError, "(0, 1)"
    ),
    case(
        "quantize float64 beyond float32",
        lambda: qc.quantize(W.astype(np.float64) * 1e39, group_size=32),
        ValueError,
        "quantize",
        "inf",
        "clip",
    ),
    case(
        "quantize scale overflow",
        lambda: qc.quantize(HUGE, bits=1, group_size=32),
        ValueError,
        "quantize",
        "scale",
        "row (1,)",
        "group 0",
        "float16",
        "float32",
    ),
    # --- quantize: the options
    case("bits 7", lambda: qc.quantize(W, bits=7), ValueError, "bits", "1, 2, 3, 4, 5, 6, 8", "7"),
    case("bits 4.0", lambda: qc.quantize(W, bits=4.0), TypeError, "bits", "integer", "float"),
    case("bits True", lambda: qc.quantize(W, bits=True), TypeError, "bits", "integer", "bool"),
    case(
        "group_size 24", lambda: qc.quantize(W, group_size=24), ValueError, "group_size", "16, 32, 64, 128, 256", "24"
    ),
    case(
        "group_size col",
        lambda: qc.quantize(W, group_size="col"),
        ValueError,
        "quantize",
        "group_size",
        "'row'",
        "'col'",
    ),
    case("group_size -1", lambda: qc.quantize(W, group_size=-1), ValueError, "group_size", "-1"),
    case("mode nf4", lambda: qc.quantize(W, mode="nf4"), ValueError, "mode", "'nf4'", "affine"),
    case("scheme name", lambda: qc.quantize(W, "int4"), ValueError, "'int4'", "affine-int4-g64"),
    case("scheme type", lambda: qc.quantize(W, 4), TypeError, "scheme", "int", "affine-int4-g64"),
    case("scheme and bits", lambda: qc.quantize(W, NAME, bits=4), TypeError, "quantize", "either", "scheme", "bits"),
    case("axis 0", lambda: qc.quantize(W, axis=0), ValueError, "quantize", "axis", "-1 or -2", "0", "(8, 64)"),
    case("axis -3", lambda: qc.quantize(STACK, axis=-3), ValueError, "quantize", "axis", "-3", "(2, 8, 64)"),
    case("axis None", lambda: qc.quantize(W, axis=None), TypeError, "quantize", "axis", "None"),
    case(
        "nonfinite", lambda: qc.quantize(W, nonfinite="zero"), ValueError, "quantize", "nonfinite", "'clip'", "'zero'"
    ),
    case(
        "quantize backend",
        lambda: qc.quantize(W, backend="metal"),
        qc.BackendNotFoundError,
        "quantize",
        "(8, 64)",
        "affine-int4-g64",
        "'metal'",
        "numpy",
    ),
    # --- quantized_tensor
    case("tensor biases None", parts(biases=None), TypeError, "quantized_tensor", NAME, "biases"),
    case("tensor scales list", parts(scales=[[1.0] * 2] * 8), TypeError, "quantized_tensor", "scales", "list"),
    case(
        "tensor packed shape",
        parts(packed=QW.packed[:, :7]),
        ValueError,
        "quantized_tensor",
        "packed",
        "(8, 7)",
        "(8, 64)",
        NAME,
        "(8, 8)",
    ),
    case(
        "tensor scales shape",
        parts(scales=QW.scales[:, :1]),
        ValueError,
        "quantized_tensor",
        "scales",
        "(8, 1)",
        "(8, 64)",
        NAME,
        "(8, 2)",
    ),
    case(
        "tensor biases shape", parts(biases=QW.biases[:4]), ValueError, "quantized_tensor", "biases", "(4, 2)", "(8, 2)"
    ),
    case(
        "tensor shape", parts(shape=(8, 128)), ValueError, "quantized_tensor", "packed", "(8, 8)", "(8, 128)", "(8, 16)"
    ),
    case("tensor one axis", parts(shape=(64,)), ValueError, "quantized_tensor", "shape", "(64,)"),
    case("tensor negative shape", parts(shape=(-8, 64)), ValueError, "quantized_tensor", "shape", "(-8, 64)"),
    case("tensor no features", parts(shape=(8, 0)), ValueError, "quantized_tensor", "shape", "(8, 0)"),
    case("tensor fractional shape", parts(shape=(8.0, 64)), TypeError, "quantized_tensor", "shape", "ints", "8.0"),
    case("tensor shape int", parts(shape=8), TypeError, "quantized_tensor", "shape", "sequence of ints", "8"),
    case(
        "tensor scheme",
        parts(scheme="affine-int8-g32"),
        ValueError,
        "quantized_tensor",
        "packed",
        "affine-int8-g32",
        "(8, 16)",
    ),
    case(
        "tensor packed dtype",
        parts(packed=QW.packed.astype(np.int32)),
        TypeError,
        "quantized_tensor",
        "packed",
        "uint32",
        "int32",
    ),
    case(
        "tensor scales dtype",
        parts(scales=QW.scales.astype(np.int8)),
        TypeError,
        "quantized_tensor",
        "scales",
        "int8",
        "floating",
    ),
    case(
        "tensor biases dtype", parts(biases=QW.biases > 0), TypeError, "quantized_tensor", "biases", "bool", "floating"
    ),
    case(
        "tensor dtype",
        parts(dtype="int8"),
        TypeError,
        "quantized_tensor",
        "dtype",
        "float16, bfloat16, float32",
        "int8",
    ),
    case(
        "tensor libraries",
        parts(scales=mx.array(QW.scales)),
        TypeError,
        "quantized_tensor",
        "packed",
        "numpy",
        "scales",
        "mlx",
        "to_library",
    ),
    case(
        "tensor devices",
        parts(packed=ELSEWHERE.packed, scales=STRICT.scales, biases=STRICT.biases),
        TypeError,
        "quantized_tensor",
        "device1",
        "CPU_DEVICE",
        "scales",
    ),
    # --- dot and matmul: shapes
    case("dot shapes", lambda: qc.dot(X[:, :60], QW), ValueError, "dot", "60", "(3, 60)", "64", "(8, 64)", NAME, ".mT"),
    case("matmul shapes", lambda: qc.matmul(X, QW), ValueError, "matmul", "(3, 64)", "(8, 64)", NAME, ".mT"),
    case("operator shapes", lambda: X @ QW, ValueError, "matmul", "(3, 64)", "(8, 64)", NAME, ".mT"),
    case("left matmul shapes", lambda: qc.matmul(QW, X), ValueError, "matmul", "64", "(8, 64)", NAME),
    case("dot of a scalar", lambda: qc.dot(np.float32(2), QW), ValueError, "dot", "0-d"),
    case("dot with a scalar", lambda: qc.dot(QW, np.asarray(2.0)), ValueError, "dot", "0-d"),
    case("dot of nothing", lambda: qc.dot(X[:, :0], QW), ValueError, "dot", "(3, 0)", "(8, 64)", NAME),
    case(
        "dot broadcast",
        lambda: qc.dot(np.ones((3, 4, 64), np.float32), QS),
        ValueError,
        "dot",
        "broadcast",
        "(3, 4, 64)",
        "(2, 8, 64)",
        NAME,
    ),
    case("dense dot shapes", lambda: qc.dot(X, W[:, :60]), ValueError, "dot", "(3, 64)", "60"),
    # --- dot and matmul: kinds
    case("dot int x", lambda: qc.dot(X.astype(np.int32), QW), TypeError, "dot", "int32", "cast", "float32"),
    case("dot bool x", lambda: qc.dot(X > 0, QW), TypeError, "dot", "bool", "cast"),
    case("dot complex x", lambda: qc.dot(X.astype(np.complex64), QW), TypeError, "dot", "complex64", "cast"),
    case("dot list", lambda: qc.dot(X.tolist(), QW), TypeError, "dot", "list", "array"),
    case("dot None", lambda: qc.dot(None, QW), TypeError, "dot", "NoneType", "array"),
    case("matmul with a number", lambda: qc.matmul(QW, 3.0), TypeError, "matmul", "float", "array"),
    case("operator with a string", lambda: QW @ "x", TypeError, "matmul", "str", "array"),
    case("dense dot int", lambda: qc.dot(X, W.astype(np.int64)), TypeError, "dot", "int64", "cast"),
    # --- products: libraries and devices
    case("dot mlx x", lambda: qc.dot(mx.array(X), QW), TypeError, "dot", "mlx", "numpy", NAME, "(8, 64)", ".to('mlx')"),
    case("dot numpy x", lambda: qc.dot(X, MLX), TypeError, "dot", "mlx", "numpy", NAME, ".to('numpy')"),
    case("operator mixed", lambda: X @ MLX.mT, TypeError, "mlx", "numpy", ".to('numpy')"),
    case("left mixed", lambda: qc.dot(MLX, X), TypeError, "dot", "mlx", "numpy", ".to('numpy')"),
    case("both quantized, mixed", lambda: qc.dot(QW, QS.to("mlx")), TypeError, "dot", "mlx", "numpy", ".to("),
    case("dense mixed", lambda: qc.dot(X, mx.array(W)), TypeError, "dot", "mlx", "numpy", "to_library"),
    case(
        "dot devices",
        lambda: qc.dot(strict.asarray(X), ELSEWHERE),
        TypeError,
        "dot",
        "CPU_DEVICE",
        "device1",
        NAME,
        "(8, 64)",
        ".to('array_api_strict', x.device)",
    ),
    case("left devices", lambda: qc.matmul(ELSEWHERE, strict.asarray(X.T.copy())), TypeError, "device1", ".to("),
    case(
        "dense devices",
        lambda: qc.dot(strict.asarray(X), strict.asarray(W, device=FAR)),
        TypeError,
        "dot",
        "CPU_DEVICE",
        "device1",
    ),
    case(
        "take devices",
        lambda: qc.take(ELSEWHERE, strict.asarray([1])),
        TypeError,
        "take",
        "CPU_DEVICE",
        "device1",
        "to_library",
    ),
    # --- tensordot
    case("axes length", lambda: qc.dot(X, QW, axes=([0, 1], [1])), ValueError, "tensordot", "2", "1"),
    case(
        "axes differ", lambda: qc.dot(X, QW, axes=([0], [1])), ValueError, "tensordot", "(3, 64)", "(8, 64)", "3", "64"
    ),
    case("axes out of range", lambda: qc.dot(X, QW, axes=([2], [1])), ValueError, "tensordot", "axis 2", "(3, 64)"),
    case(
        "axes negative out of range", lambda: qc.dot(X, QW, axes=([1], [-3])), ValueError, "tensordot", "-3", "(8, 64)"
    ),
    case("axes twice", lambda: qc.tensordot(X, QW, axes=([1, -1], [1, 0])), ValueError, "tensordot", "twice"),
    case("axes string", lambda: qc.tensordot(X, QW, axes="ij"), TypeError, "tensordot", "axes", "'ij'"),
    case("axes bool", lambda: qc.tensordot(X, QW, axes=True), TypeError, "tensordot", "axes", "True"),
    case("axes float", lambda: qc.tensordot(X, QW, axes=([1.0], [1])), TypeError, "tensordot", "axes", "1.0"),
    case("axes too many", lambda: qc.tensordot(X, QW, axes=3), ValueError, "tensordot", "3", "(3, 64)", "(8, 64)"),
    case(
        "axes both",
        lambda: qc.tensordot(W, QW, axes=([0, 1], [0, 1])),
        ValueError,
        "tensordot",
        "both",
        "(8, 64)",
        NAME,
        "dequantize",
    ),
    case(
        "axes neither",
        lambda: qc.tensordot(np.ones((2, 3), np.float32), QS, axes=([0], [0])),
        ValueError,
        "tensordot",
        "neither",
        "(2, 8, 64)",
        NAME,
        "dequantize",
    ),
    case("axes outer", lambda: qc.tensordot(X, QW, axes=0), ValueError, "tensordot", "neither", NAME, "dequantize"),
    case(
        "left axes both",
        lambda: qc.tensordot(QW, W, axes=2),
        ValueError,
        "tensordot",
        "both",
        "(8, 64)",
        NAME,
        "dequantize",
    ),
    case(
        "left axes neither", lambda: qc.tensordot(QS, X[:2], axes=([0], [0])), ValueError, "tensordot", "neither", NAME
    ),
    # --- options of products
    case("precision", lambda: qc.dot(X, QW, precision="exact"), ValueError, "precision", "'highest'", "'exact'"),
    case("dense precision", lambda: qc.dot(X, W, precision="exact"), ValueError, "precision", "'exact'"),
    case("precision list", lambda: qc.dot(X, QW, precision=["fast"]), TypeError, "dot", "precision", "string"),
    case("out_dtype int", lambda: qc.dot(X, QW, out_dtype=np.int32), TypeError, "dot", "out_dtype", "int32", "float32"),
    case(
        "out_dtype word", lambda: qc.matmul(X, QW.mT, out_dtype="float8"), TypeError, "out_dtype", "float8", "float16"
    ),
    case("out_dtype list", lambda: qc.dot(X, QW, out_dtype=[]), TypeError, "dot", "out_dtype", "dtype"),
    case("out_dtype of dense", lambda: qc.dot(X, W, out_dtype="int8"), TypeError, "dot", "out_dtype", "int8"),
    case("out_dtype of take", lambda: qc.take(QW, 0, out_dtype="int8"), TypeError, "take", "out_dtype", "int8"),
    case(
        "out_dtype that the library lacks",
        lambda: qc.dot(strict.asarray(X), STRICT, out_dtype="bfloat16"),
        qc.UnsupportedError,
        "array_api_strict",
        "bfloat16",
        "cast",
    ),
    case("dequantize dtype", lambda: qc.dequantize(QW, dtype="uint8"), TypeError, "dequantize", "dtype", "uint8"),
    case("dequantize list", lambda: qc.dequantize([1.0]), TypeError, "dequantize", "list", "array"),
    case(
        "backend unknown",
        lambda: qc.dot(X, QW, backend="cuda"),
        qc.BackendNotFoundError,
        "dot",
        "(3, 64)",
        "(8, 64)",
        NAME,
        "'cuda'",
        "installed or registered",
        "numpy",
        "mlx",
    ),
    case("backend number", lambda: qc.dot(X, QW, backend=3), qc.BackendNotFoundError, "dot", "3", "numpy"),
    case(
        "backend of another library",
        lambda: qc.dot(X, QW, backend="mlx"),
        qc.NoBackendError,
        "dot",
        "(3, 64)",
        NAME,
        "'mlx'",
        "numpy",
        ".to('mlx')",
    ),
    case(
        "backend that refuses",
        lambda: qc.dot(mx.ones((3, 64), dtype=mx.float64), MLX, backend="mlx"),
        qc.UnsupportedError,
        "dot",
        "(3, 64)",
        "float64",
        "(8, 64)",
        NAME,
        "mlx:",
        "leave the choice",
    ),
    case(
        "backend that refuses to quantize",
        lambda: qc.quantize(mx.array(W), group_size=16, backend="mlx"),
        qc.UnsupportedError,
        "quantize",
        "(8, 64)",
        "affine-int4-g16",
        "mlx:",
        "32, 64, 128",
    ),
    case("use_backend unknown", lambda: qc.use_backend("cuda").__enter__(), qc.BackendNotFoundError, "'cuda'", "numpy"),
    case("unregister unknown", lambda: qc.unregister("cuda"), qc.BackendNotFoundError, "'cuda'", "numpy"),
    case("use_precision", lambda: qc.use_precision("exact").__enter__(), ValueError, "'default'", "'exact'"),
    # --- take
    case("take beyond", lambda: qc.take(QW, np.asarray([8])), IndexError, "take", "8", "(8, 64)", NAME),
    case("take list beyond", lambda: qc.take(QW, [0, -9]), IndexError, "take", "-9", "length 8"),
    case("take MLX list beyond", lambda: qc.take(MLX, [8]), IndexError, "take", "8", "length 8"),
    case("take strict beyond", lambda: qc.take(STRICT, strict.asarray([8])), IndexError, "take", "(8, 64)", NAME),
    case("take floats", lambda: qc.take(QW, np.asarray([1.0])), TypeError, "take", "indices", "integers", "float64"),
    case("take float list", lambda: qc.take(QW, [0.5]), TypeError, "take", "indices", "integers", "float64"),
    case("take bools", lambda: qc.take(QW, np.ones(8, bool)), TypeError, "take", "indices", "integers", "bool"),
    case("take strings", lambda: qc.take(QW, ["a"]), TypeError, "take", "indices", "integers"),
    case("take None", lambda: qc.take(QW, None), TypeError, "take", "indices", "integers"),
    case(
        "take grouped axis", lambda: qc.take(QW, 0, axis=1), ValueError, "take", "axis 1", "(8, 64)", NAME, "dequantize"
    ),
    case("take grouped axis -1", lambda: qc.take(QW, 0, axis=-1), ValueError, "take", "grouped", NAME, "dequantize"),
    case("take grouped axis of mT", lambda: qc.take(QW.mT, 0, axis=0), ValueError, "take", "(64, 8)", "grouped"),
    case("take axis beyond", lambda: qc.take(QW, 0, axis=2), ValueError, "take", "axis 2", "(8, 64)"),
    case("take axis None", lambda: qc.take(QW, 0, axis=None), TypeError, "take", "axis", "None"),
    case("take indices of mlx", lambda: qc.take(QW, mx.array([0])), TypeError, "take", "mlx", "numpy", "to_library"),
    case("take of a list", lambda: qc.take([1, 2], 0), TypeError, "take", "list", "array"),
    # --- gather_dot
    case("gather vector", lambda: qc.gather_dot(X[0], QS), ValueError, "gather_dot", "2 axes", "(64,)"),
    case("gather quantized x", lambda: qc.gather_dot(QW, QS), TypeError, "gather_dot", NAME, "(8, 64)", "dequantize"),
    case("gather list", lambda: qc.gather_dot([X], QS), TypeError, "gather_dot", "list", "array"),
    case("gather shapes", lambda: qc.gather_dot(X[:, :60], QS), ValueError, "gather_dot", "60", "(2, 8, 64)", NAME),
    case(
        "gather broadcast",
        lambda: qc.gather_dot(np.stack([X] * 3), QS, [0, 1, 2], [0, 1]),
        ValueError,
        "gather_dot",
        "(3,)",
        "(2,)",
        "broadcast",
    ),
    case(
        "gather beyond",
        lambda: qc.gather_dot(X, QS, None, np.asarray([2])),
        IndexError,
        "gather_dot",
        "2",
        "(3, 64)",
        "(2, 8, 64)",
        NAME,
    ),
    case("gather list beyond", lambda: qc.gather_dot(X, QS, [1], [0]), IndexError, "gather_dot", "1", "length 1"),
    case("gather floats", lambda: qc.gather_dot(X, QS, None, [0.0]), TypeError, "gather_dot", "integers", "float64"),
    case(
        "gather indices of mlx",
        lambda: qc.gather_dot(X, QS, None, mx.array([0])),
        TypeError,
        "gather_dot",
        "mlx",
        "numpy",
    ),
    case("gather int x", lambda: qc.gather_dot(X.astype(np.int8), QS), TypeError, "gather_dot", "int8", "cast"),
    case("gather mixed", lambda: qc.gather_dot(mx.array(X), QS), TypeError, "gather_dot", "mlx", "numpy", ".to("),
    # --- the tensor
    case("astype", lambda: QW.astype("float64"), TypeError, "astype", "float16, bfloat16, float32", "float64"),
    case("T of a stack", lambda: QS.T, ValueError, "2 axes", "(2, 8, 64)", "mT"),
    case("index below rank 2", lambda: QW[0], IndexError, "2 axes", "(8, 64)", "take"),
    case("index grouped axis", lambda: QW[:, :32], IndexError, "grouped axis", "(8, 64)", "dequantize"),
    case("index array", lambda: QW[np.asarray([0])], TypeError, "ints and slices", "take"),
    case("index beyond", lambda: QS[2], IndexError, "2", "axis 0", "length 2"),
    case("truth", lambda: bool(QW), TypeError, "truth", "dequantize"),
    case("asarray", lambda: np.asarray(QW), TypeError, "NumPy array", "dequantize"),
    case("numpy add", lambda: X + QW, TypeError, "numpy.add", "dequantize", "matmul"),
    case("numpy sum", lambda: np.sum(QW), TypeError, "numpy.sum", "dequantize", "tensordot"),
    case("to unknown", lambda: QW.to("nosuchlib"), qc.BackendNotFoundError, "'nosuchlib'", "known libraries", "mlx"),
    case("to nothing", lambda: QW.to(""), qc.BackendNotFoundError, "known libraries", "numpy"),
    case("to a module that is no array library", lambda: QW.to("json"), qc.BackendNotFoundError, "'json'", "numpy"),
    case("to a number", lambda: QW.to(3), TypeError, "library", "'numpy'", "int"),
    case("to numpy on a gpu", lambda: MLX.to("numpy", "cuda"), ValueError, "numpy", "cpu", "'cuda'"),
    case("to_library of a list", lambda: qc.to_library([1.0], "numpy"), TypeError, "to_library", "array", "list"),
    case("prepack of dense", lambda: qc.prepack(W), TypeError, "prepack", "QuantizedTensor", "ndarray"),
    # --- explain and array_namespace
    case("explain unknown op", lambda: qc.explain("einsum", X, QW), ValueError, "explain", "'einsum'", "dot", "take"),
    case("explain operands", lambda: qc.explain("dot", QW), TypeError, "explain", "dot", "2 operands", "1"),
    case("explain dense", lambda: qc.explain("dot", X, W), TypeError, "explain", "dot", "exactly one"),
    case("explain take of dense", lambda: qc.explain("take", W), TypeError, "explain", "take", "QuantizedTensor"),
    case(
        "explain quantize of quantized", lambda: qc.explain("quantize", QW), TypeError, "explain", "quantize", "dense"
    ),
    case("explain mixed", lambda: qc.explain("dot", X, MLX), TypeError, "mlx", "numpy", ".to("),
    case(
        "explain gather the wrong way", lambda: qc.explain("gather_dot", QS, X), TypeError, "explain", "second operand"
    ),
    case("namespace mixed", lambda: qc.array_namespace(X, MLX), TypeError, "array_namespace", "mlx", "numpy", ".to("),
    case("namespace of a list", lambda: qc.array_namespace([1.0]), TypeError, "list"),
    case("explain shapes that don't fit", lambda: qc.explain("dot", X[:, :3], QW), ValueError, "dot", "(3, 3)", NAME),
    case(
        "explain a product's scheme", lambda: qc.explain("dot", X, QW, scheme="mxfp4"), TypeError, "explain", "scheme"
    ),
    # --- what libraries would say in their own words
    case("take backend dense", lambda: qc.take(W, [1], backend="nope"), qc.BackendNotFoundError, "take", "nope"),
    case("dot backend dense", lambda: qc.dot(X, W, backend="nope"), qc.BackendNotFoundError, "dot", "nope"),
    case("dequantize backend dense", lambda: qc.dequantize(W, backend="no"), qc.BackendNotFoundError, "dequantize"),
    case("dequantize backend list", lambda: qc.dequantize(QW, backend=["x"]), TypeError, "dequantize", "string"),
    case("dequantize dtype list", lambda: qc.dequantize(QW, dtype=[3]), TypeError, "dtype", "[3]"),
    case("astype None", lambda: QW.astype(None), TypeError, "dtype", "None"),
    case("take ragged", lambda: qc.take(QW, [[1], [1, 2]]), ValueError, "take", "indices"),
    case("take dense out of range", lambda: qc.take(W, np.array([9])), IndexError, "take", "9", "(8, 64)"),
    case("take uint64", lambda: qc.take(QW, np.array([2**64 - 1], np.uint64)), IndexError, "take", "8", NAME),
    case("take uint64 dense", lambda: qc.take(W, np.array([2**64 - 3], np.uint64)), IndexError, "take", "(8, 64)"),
    case(
        "gather_dot uint64",
        lambda: qc.gather_dot(X, QS, rhs_indices=np.array([2**63], np.uint64)),
        IndexError,
        "gather_dot",
        NAME,
    ),
    case("quantize bits", lambda: qc.quantize(W, bits=7), ValueError, "quantize", "bits", "7"),
    case("quantize group 48", lambda: qc.quantize(W, group_size=48), ValueError, "quantize", "48", "'row'"),
    case("dot precision", lambda: qc.dot(X, QW, precision="hi"), ValueError, "dot", "precision", "hi"),
    case("MLX device", lambda: QW.to("mlx", "nodev"), ValueError, "mlx", "nodev", "mx.cpu"),
    # --- registration
    case("register a class", lambda: qc.register(dict), qc.PluginValidationError, "dict", "instance"),
    case(
        "register nothing", lambda: qc.register(object()), qc.PluginValidationError, "backend_info", "dot", "hookimpl"
    ),
]


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) >= 80
    assert len({row.id for row in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's own, from making the bad input
@pytest.mark.parametrize("row", CASES, ids=[row.id for row in CASES])
def test_bad_input(row: Case) -> None:
    with pytest.raises(row.error) as caught:
        row.call()
    assert type(caught.value) is row.error
    message = str(caught.value)
    for word in row.words:
        assert word in message, f"{word!r} isn't in: {message}"
    assert "\n" not in message.strip()


def test_errors_are_also_the_standard_ones() -> None:
    for error, standard in [
        (qc.BackendNotFoundError, LookupError),
        (qc.BackendUnavailableError, ImportError),
        (qc.NoBackendError, TypeError),
        (qc.UnsupportedError, NotImplementedError),
        (qc.PluginValidationError, TypeError),
        (qc.FormatError, ValueError),
        (qc.InexactConversionError, ValueError),
    ]:
        assert issubclass(error, standard)
        assert issubclass(error, qc.QuantcoreError)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: qc.dot(X, QW, backend="numpy"), ("dot", "(3, 64)", NAME)),
        (lambda: qc.quantize(W, backend="numpy"), ("quantize", "(8, 64)", "affine-int4-g64")),
        (lambda: qc.dequantize(QW, backend="numpy"), ("dequantize", "(8, 64)", NAME)),
        (lambda: qc.use_backend("numpy").__enter__(), ()),
    ],
)
def test_a_disabled_backend_says_so(spoil: pytest.MonkeyPatch, call: Callable[[], Any], words: tuple[str, ...]) -> None:
    spoil.setenv("QUANTCORE_DISABLE", "numpy")
    qc.refresh()
    with pytest.raises(qc.BackendUnavailableError) as caught:
        call()
    for word in (*words, "'numpy'", "DISABLED", "QUANTCORE_DISABLE"):
        assert word in str(caught.value)


def test_with_every_backend_disabled_the_message_lists_them(spoil: pytest.MonkeyPatch) -> None:
    spoil.setenv("QUANTCORE_DISABLE", "numpy, array_api,mlx")
    qc.refresh()
    for call in (lambda: qc.dot(X, QW), lambda: qc.quantize(W), lambda: QW.dequantize(), lambda: qc.take(QW, 0)):
        with pytest.raises(qc.NoBackendError, match=r"ndarray.*array_api.*DISABLED.*numpy.*QUANTCORE_DISABLE"):
            call()
    with pytest.raises(qc.BackendUnavailableError, match=r"mlx.*QUANTCORE_DISABLE"):
        QW.to("mlx")


def test_every_pair_of_libraries_is_refused_in_the_same_words() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    xs = {
        "numpy": X,
        "mlx": mx.array(X),
        "torch": torch.from_numpy(X),
        "jax": jax.asarray(X),
        "array_api_strict": strict.asarray(X),
    }
    for ours, x in xs.items():
        for theirs in xs.keys() - {ours}:
            weight = QW.to(theirs)
            for call in (lambda: qc.dot(x, weight), lambda: qc.dot(weight, x), lambda: qc.matmul(x, weight.mT)):  # noqa: B023
                with pytest.raises(TypeError, match=f"is a {ours} array and the weight .* is in {theirs}"):
                    call()


def test_torch_says_which_device_or_layout_is_wrong() -> None:
    torch = pytest.importorskip("torch")
    x, weight = torch.from_numpy(X).to_sparse(), QW.to("torch")
    for call, op in (
        (lambda: qc.dot(x, weight), "dot"),
        (lambda: qc.gather_dot(x, QS.to("torch")), "gather_dot"),
        (lambda: qc.quantize(x), "quantize"),
    ):
        with pytest.raises(TypeError, match=rf"{op}: .*layout torch.sparse_coo; call .to_dense\(\) first"):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="can't move to 'torch' on the device 'cuda'"):
            QW.to("torch", "cuda")


def test_indices_too_large_for_a_signed_integer_are_nan_in_mlx() -> None:
    rows = qc.take(MLX, mx.array(np.array([2**64 - 1, 3], np.uint64)))
    np.testing.assert_array_equal(np.isnan(np.asarray(rows)).all(1), [True, False])


def test_a_number_of_threads_that_is_none_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcore_backends.cpu_kernels import threads

    monkeypatch.setenv("QUANTCORE_NUM_THREADS", "many")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    with pytest.warns(RuntimeWarning, match="QUANTCORE_NUM_THREADS='many'"):
        assert threads.thread_count() == 3


def test_integers_of_numpy_are_axes() -> None:
    np.testing.assert_array_equal(qc.take(QW, [1], axis=np.int64(0)), qc.take(QW, [1], axis=0))
    assert qc.quantize(W, axis=np.int64(-1)).shape == (8, 64)


def test_the_command_refuses_a_backend_that_is_not_there() -> None:
    told = CliRunner().invoke(app, ["explain", "dot", "--backend", "nope"])
    assert told.exit_code == 2
    assert "no backend is named 'nope'" in told.output
