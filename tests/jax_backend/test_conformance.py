"""The conformance kit on the JAX backend: concrete arrays, and the same under jit.

64-bit types are on, so that a float64 x is tested as well.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import pytest

import quantcore as qc
from quantcore.testing import BackendConformance
from quantcore_backends.jax_backend import JAXBackend

_inner = JAXBackend()
_quantize = jax.jit(_inner.quantize, static_argnums=1)
_dequantize = jax.jit(_inner.dequantize, static_argnums=1)
_dot = jax.jit(_inner.dot, static_argnums=(2, 3))
_take = jax.jit(_inner.take, static_argnums=(2, 3))
_gather_dot = jax.jit(_inner.gather_dot, static_argnums=(4, 5))


class Jitted:
    """The hooks of the JAX backend, each compiled: what they give inside a user's jit."""

    @qc.hookimpl
    def backend_info(self) -> qc.BackendInfo:
        return replace(_inner.backend_info(), name="jax_jitted", priority=-1)

    @qc.hookimpl
    def prepare(self) -> None:
        _inner.prepare()

    @qc.hookimpl
    def supports(self, op: str, call: qc.Call) -> bool | str:
        return _inner.supports(op, call)

    @qc.hookimpl
    def quantize(self, w: Any, scheme: qc.Scheme) -> Any:
        return _quantize(w, scheme)

    @qc.hookimpl
    def dequantize(self, qw: qc.QuantizedTensor, dtype: str) -> Any:
        return _dequantize(qw, dtype)

    @qc.hookimpl
    def dot(self, x: Any, qw: qc.QuantizedTensor, dtype: str, precision: str) -> Any:
        return _dot(x, qw, dtype, precision)

    @qc.hookimpl
    def take(self, qw: qc.QuantizedTensor, indices: Any, axis: int, dtype: str) -> Any:
        return _take(qw, indices, axis, dtype)

    @qc.hookimpl
    def gather_dot(
        self, x: Any, qw: qc.QuantizedTensor, lhs_indices: Any, rhs_indices: Any, dtype: str, precision: str
    ) -> Any:
        return _gather_dot(x, qw, lhs_indices, rhs_indices, dtype, precision)


@pytest.fixture(scope="module", autouse=True)
def _with_64_bits() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def _jitted() -> Iterator[None]:
    qc.register(Jitted())
    yield
    qc.unregister("jax_jitted")
    jax.clear_caches()


class TestJAX(BackendConformance):
    backend = "jax"


@pytest.mark.usefixtures("_jitted")
class TestJAXJitted(BackendConformance):
    backend = "jax_jitted"
    library = "jax"
