"""array_namespace: array-API code that knows nothing of quantization gives the same with quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np
import pytest

import quantcore as qc

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(3)
TABLE = RNG.standard_normal((20, 64)).astype(np.float32)
FIRST = RNG.standard_normal((96, 64)).astype(np.float32)
SECOND = RNG.standard_normal((64, 96)).astype(np.float32)
TOKENS = np.asarray([3, 19, 0, 3])


def mlp(tokens: Any, table: Any, first: Any, second: Any) -> Any:
    """An embedding and a two-layer network in array-API code: not a word of quantization."""
    xp = array_namespace_of_the_caller(tokens, table, first, second)
    x = xp.take(table, tokens, axis=0)
    hidden = xp.matmul(x, xp.matrix_transpose(first))
    hidden = xp.maximum(hidden, xp.zeros_like(hidden))
    out = xp.linalg.matmul(hidden, xp.linalg.matrix_transpose(second))
    again = xp.tensordot(hidden, second, axes=([1], [1]))
    third = xp.linalg.tensordot(hidden, xp.matrix_transpose(second), axes=1)
    out = out + again / 2 + third / 4
    return xp.sum(xp.astype(out, xp.float32), axis=0) / xp.sqrt(xp.asarray(out.shape[0] * xp.pi, dtype=out.dtype))


def array_namespace_of_the_caller(*arrays: Any) -> Any:
    return qc.array_namespace(*arrays)


@pytest.mark.parametrize("orientation", ["as quantized", "twice transposed"])
def test_unchanged_array_api_code(lib: Any, orientation: str, close: Any) -> None:
    weights = [qc.quantize(lib.array(w), group_size=32) for w in (TABLE, FIRST, SECOND)]
    if orientation == "twice transposed":
        weights = [weights[0], weights[1].mT.mT, weights[2].mT.mT]
    dense = [qw.dequantize() for qw in weights]
    tokens = lib.array(TOKENS)
    close(lib.numpy(mlp(tokens, *weights)), lib.numpy(mlp(tokens, *dense)), bound=1e-7)  # of five products


def test_mixing_quantized_and_dense_weights(lib: Any, close: Any) -> None:
    table, first = qc.quantize(lib.array(TABLE)), qc.quantize(lib.array(FIRST))
    tokens, second = lib.array(TOKENS), lib.array(SECOND)
    dense = lib.numpy(mlp(tokens, table.dequantize(), first.dequantize(), second))
    close(lib.numpy(mlp(tokens, table, first, second)), dense)


def test_dense_code_gives_what_the_plain_namespace_gives(lib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = [lib.array(w) for w in (TOKENS, TABLE, FIRST, SECOND)]
    ours = mlp(*dense)
    if lib.name == "mlx":  # its namespace has no linalg.matmul, which ours adds
        x, w = lib.array(TABLE), lib.array(FIRST)
        np.testing.assert_array_equal(
            lib.numpy(qc.array_namespace(x).matmul(x, w.T)), lib.numpy(lib.module.matmul(x, w.T))
        )
        return
    monkeypatch.setitem(globals(), "array_namespace_of_the_caller", array_api_compat.array_namespace)
    np.testing.assert_array_equal(lib.numpy(ours), lib.numpy(mlp(*dense)))


@pytest.mark.parametrize("quantized", ["left", "right"])
def test_each_product(lib: Any, quantized: str, close: Any) -> None:
    qw = qc.quantize(lib.array(FIRST), group_size=32)
    x = lib.array(TABLE)
    xp = qc.array_namespace(x, qw)
    expected = TABLE @ lib.numpy(qw.dequantize()).T
    products = (
        [
            xp.matmul(x, qw.mT),
            xp.linalg.matmul(x, qw.mT),
            xp.tensordot(x, qw, axes=([1], [1])),
            xp.tensordot(x, qw.mT, axes=1),
        ]
        if quantized == "right"
        else [
            xp.matrix_transpose(xp.matmul(qw, xp.matrix_transpose(x))),
            xp.matrix_transpose(xp.linalg.matmul(qw, xp.matrix_transpose(x))),
            xp.matrix_transpose(xp.tensordot(qw, x, axes=([1], [1]))),
        ]
    )
    for product in products:
        close(lib.numpy(product), expected)


def test_astype_and_matrix_transpose_stay_quantized(lib: Any) -> None:
    qw = qc.quantize(lib.array(FIRST))
    xp = qc.array_namespace(qw)
    assert xp.matrix_transpose(qw).shape == (64, 96)
    assert xp.matrix_transpose(qw).packed is qw.packed
    assert xp.linalg.matrix_transpose(qw).shape == (64, 96)
    cast = xp.astype(qw, xp.float32, copy=False)
    assert qc.is_quantized(cast)
    assert cast.scales is qw.scales
    with pytest.raises(TypeError, match=r"astype.*float64"):
        xp.astype(qw, xp.float64)


def test_astype_moves_no_device(lib: Any) -> None:
    qw = qc.quantize(lib.array(FIRST))
    with pytest.raises(TypeError, match=r"\.to\(library, device\)"):
        qc.array_namespace(qw).astype(qw, qw.dtype, device="elsewhere")


def test_take_needs_an_axis(lib: Any) -> None:
    qw = qc.quantize(lib.array(TABLE))
    xp = qc.array_namespace(qw)
    where = lib.array(TOKENS)
    np.testing.assert_array_equal(lib.numpy(xp.take(qw, where, axis=0)), lib.numpy(qw.dequantize())[TOKENS])
    with pytest.raises(ValueError, match=r"take.*axis"):
        xp.take(qw, where)


REFUSED: list[tuple[str, Callable[[Any, Any, Any], Any]]] = [
    ("concat", lambda xp, qw, x: xp.concat([qw, x])),
    ("concat", lambda xp, qw, x: xp.concat((x, qw), axis=0)),
    ("stack", lambda xp, qw, x: xp.stack([qw, qw])),
    ("add", lambda xp, qw, x: xp.add(qw, x)),
    ("add", lambda xp, qw, x: xp.add(x, qw)),
    ("exp", lambda xp, qw, x: xp.exp(qw)),
    ("sum", lambda xp, qw, x: xp.sum(qw)),
    ("reshape", lambda xp, qw, x: xp.reshape(qw, (-1,))),
    ("where", lambda xp, qw, x: xp.where(x > 0, qw, x)),
    ("zeros_like", lambda xp, qw, x: xp.zeros_like(qw)),
    ("permute_dims", lambda xp, qw, x: xp.permute_dims(qw, (1, 0))),
    ("broadcast_to", lambda xp, qw, x: xp.broadcast_to(qw, (2, *qw.shape))),
    ("asarray", lambda xp, qw, x: xp.asarray(qw)),
]


@pytest.mark.parametrize(("name", "use"), REFUSED)
def test_other_functions_say_to_dequantize(lib: Any, name: str, use: Callable[[Any, Any, Any], Any]) -> None:
    x = lib.array(FIRST)
    qw = qc.quantize(x)
    with pytest.raises(TypeError, match=rf"\.{name} doesn't take a QuantizedTensor.*dequantize.*matmul"):
        use(qc.array_namespace(x, qw), qw, x)


def test_keyword_operands_are_seen_too(lib: Any) -> None:
    x = lib.array(FIRST)
    qw = qc.quantize(x)
    xp = qc.array_namespace(x)
    with pytest.raises(TypeError, match="dequantize"):
        xp.clip(x, max=qw)


@pytest.mark.parametrize(("extension", "name"), [("linalg", "svd"), ("fft", "rfft")])
def test_functions_of_extensions_say_so_too(lib: Any, extension: str, name: str) -> None:
    x = lib.array(FIRST)
    function = getattr(getattr(qc.array_namespace(x), extension), name)
    with pytest.raises(TypeError, match=rf"{name} doesn't take a QuantizedTensor.*dequantize"):
        function(qc.quantize(x))
    if name == "rfft":
        np.testing.assert_allclose(lib.numpy(function(x)), np.fft.rfft(FIRST), rtol=1e-4, atol=1e-4)


def test_dtypes_and_constants_pass_through(lib: Any) -> None:
    x = lib.array(FIRST)
    plain = array_api_compat.array_namespace(x)
    xp = qc.array_namespace(x)
    for name in ("float32", "float64", "int64", "uint32", "uint8"):
        assert getattr(xp, name) is getattr(plain, name)
    for name in ("pi", "e", "inf"):
        assert getattr(xp, name) == getattr(plain, name)
    assert np.isnan(xp.nan)
    assert xp.newaxis is None
    assert x.dtype == xp.float32
    assert lib.numpy(xp.zeros((2, 3), dtype=xp.float32)).tolist() == [[0.0] * 3] * 2
    assert xp.finfo(xp.float32).max > 3e38


def test_unknown_names_are_attribute_errors(lib: Any) -> None:
    xp = qc.array_namespace(lib.array(FIRST))
    with pytest.raises(AttributeError):
        _ = xp.no_such_function
    with pytest.raises(AttributeError):
        _ = xp.linalg.no_such_function
    assert not hasattr(xp, "no_such_function")
    assert "matmul" in dir(xp)


def test_one_proxy_per_namespace(lib: Any) -> None:
    x = lib.array(FIRST)
    qw = qc.quantize(x)
    xp = qc.array_namespace(x)
    assert qc.array_namespace(qw) is xp
    assert qc.array_namespace(qw, x, qw.mT) is xp
    assert xp.matmul is xp.matmul
    assert lib.name in repr(xp)
    assert xp.__name__ != array_api_compat.array_namespace(x).__name__


def test_several_libraries_are_refused(libraries: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"array_namespace.*mlx.*numpy.*\.to\(library\)"):
        qc.array_namespace(FIRST, qc.quantize(FIRST).to("mlx"))
    with pytest.raises(TypeError):
        qc.array_namespace()


def test_python_scalars_beside_arrays_are_as_in_array_api_compat() -> None:
    x = FIRST
    assert qc.array_namespace(x, 1.0, None) is qc.array_namespace(x)
    with pytest.raises(TypeError):
        qc.array_namespace("x")


def test_functions_keep_their_names_and_docs(lib: Any) -> None:
    xp = qc.array_namespace(lib.array(FIRST))
    assert xp.matmul.__name__ == "matmul"
    assert xp.exp.__name__ == "exp"
