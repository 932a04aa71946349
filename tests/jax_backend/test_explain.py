"""What explain says of the path that the JAX backend takes, held against what XLA is given to compile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import quantcore as qc
from quantcore_backends.cpu_kernels import integer
from quantcore_backends.jax_backend import paths, routes
from quantcore_backends.jax_backend.ffi import abi, targets

CALLS = {
    "a compiled kernel multiplies": {"quantcore_product"},
    "a compiled kernel makes tiles": {"quantcore_decode"},
    "XLA makes tiles": set(),
}


def path(*arguments: Any, **options: Any) -> str:
    """What is said of the chosen backend, which is JAX's."""
    explanation = qc.explain(*arguments, **options)
    assert explanation.backend == "jax"
    (said,) = (verdict.path for verdict in explanation.verdicts if verdict.chosen)
    assert said in str(explanation)
    return said


def check(function: Any, op: str, x: Any, qw: Any, **options: Any) -> str:
    """The path, which is that of the module that JAX lowers."""
    said = path(op, x, qw, **options)
    (begins,) = (begins for begins in CALLS if f"inside jit, {begins}" in said)
    lowered = jax.jit(lambda x, qw: function(x, qw, **options)).lower(x, qw).as_text()
    assert set(re.findall(r"quantcore_(?:product|decode)(?=\()", lowered)) == CALLS[begins], said
    return said


@pytest.fixture
def failing_check(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A jaxlib whose version of the interface isn't known."""
    monkeypatch.setattr(abi, "VERSIONS", ((9, 9),))
    targets.unusable.cache_clear()
    jax.clear_caches()
    routes._warned_of.cache_clear()
    yield
    targets.unusable.cache_clear()
    jax.clear_caches()


def test_a_failed_check_is_the_reason(case: Any, failing_check: None) -> None:
    it = case()
    with pytest.warns(qc.PerformanceWarning, match=r"know 9\.9"):
        said = check(qc.dot, "dot", it.x, it.qw)
    assert re.search(r"more slowly: jaxlib's FFI is version \d\.\d; the compiled targets know 9\.9", said)
    assert "9.9" not in path("take", it.qw)


def test_explaining_warns_of_nothing(case: Any, failing_check: None, recwarn: pytest.WarningsRecorder) -> None:
    it = case()
    path("dot", it.x, it.qw)
    assert not [w for w in recwarn if issubclass(w.category, qc.PerformanceWarning)]


@pytest.mark.parametrize(
    ("rows", "precision", "words"),
    [
        (4, "default", "16-bit integers"),
        (13, "default", "16-bit integers"),
        (4, "fast", "8-bit integers"),
        (13, "fast", "8-bit integers"),
        (4, "highest", "24-bit integers"),
        (5, "highest", "in float32"),
        (1000, "highest", "in float32"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_and_the_reason(case: Any, rows: int, precision: str, words: str, dtype: Any) -> None:
    it = case(rows=rows)
    if precision == "highest" and not integer.has_wide(it.qw.scheme):
        words = words.replace("24-bit integers", "in float32")
    if precision == "fast" and not integer.has_byte_dot(it.qw.scheme):
        words = "16-bit integers"
    assert words in check(qc.dot, "dot", it.x.astype(dtype), it.qw, precision=precision)


@pytest.mark.parametrize(
    ("scheme", "precision", "rows", "words"),
    [
        ("affine-int1-g16", "default", 12, "in float32"),
        ("affine-int1-g16", "default", 13, "x has 13 rows and a kernel alone multiplies at most 12"),
        ("affine-int4-row", "highest", 33, "in float32"),
        ("affine-int4-row", "default", 33, "16-bit integers"),
    ],
)
def test_schemes_with_other_kernels(case: Any, scheme: str, precision: str, rows: int, words: str) -> None:
    it = case(rows=rows, scheme=scheme)
    assert words in check(qc.dot, "dot", it.x, it.qw, precision=precision)


def test_rows_are_counted_as_the_product_counts_them(case: Any) -> None:
    it, stack = case(rows=2), case(shape=(3, 24, 128), rows=2)
    x = jnp.broadcast_to(it.x, (3, 2, 128))
    wide = "24-bit integers" if integer.has_wide(it.qw.scheme) else "in float32"
    assert "in float32" in check(qc.dot, "dot", x, it.qw, precision="highest")
    assert wide in check(qc.dot, "dot", x, stack.qw, precision="highest")
    assert wide in check(qc.gather_dot, "gather_dot", x, stack.qw, precision="highest")
    assert "16-bit" in check(qc.dot, "dot", it.x[0], it.qw)
    assert "in float32" in check(qc.dot, "dot", it.x[:2, :24], it.qw.mT)
    assert "x has 13 rows" in check(qc.dot, "dot", jnp.ones((13, 24)), it.qw.mT)


def test_float64_is_a_reason(case: Any) -> None:
    it = case()
    jax.config.update("jax_enable_x64", True)
    try:
        assert "in float32, not in float64" in check(qc.dot, "dot", it.x.astype(jnp.float64), it.qw)
        assert "not in float64" in check(qc.dot, "dot", it.x, it.qw, out_dtype="float64")
    finally:
        jax.config.update("jax_enable_x64", False)


def test_inside_a_trace_the_platform_is_open(case: Any) -> None:
    it, told = case(), []
    jax.eval_shape(lambda x, w: told.append(path("dot", x, w)), it.x, it.qw)
    assert told == [
        "on a CPU, a compiled kernel multiplies x rounded to 16-bit integers; elsewhere, XLA makes tiles of the weight "
        "dense and multiplies them"
    ]


def test_a_platform_without_kernels_is_a_reason() -> None:
    call = qc.Call(
        scheme=qc.Scheme(),
        layout="row",
        transposed=False,
        dtype="float32",
        x_dtype="float32",
        out_dtype="float32",
        device="gpu",
        precision="default",
        x_shape=(1, 64),
        w_shape=(8, 64),
    )
    assert paths.described("dot", call).endswith("the compiled kernels are for CPUs, not for gpu")


@pytest.mark.parametrize("op", ["quantize", "dequantize", "take"])
def test_what_is_no_product(case: Any, op: str) -> None:
    it = case()
    said = path(op, it.w if op == "quantize" else it.qw)
    assert said == "concrete arrays on one device go to our CPU kernels; inside jit, XLA's own operations compute it"
