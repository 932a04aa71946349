"""What the tests of the JAX backend share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import quantcore as qc
from quantcore.testing import oracle

Array = np.ndarray[Any, Any]


class Case:
    """A weight in JAX's arrays with its exact value, and inputs."""

    def __init__(self, shape: tuple[int, ...] = (24, 128), scheme: str = "affine-int4-g64", rows: int = 3) -> None:
        random = np.random.default_rng(0)
        self.w = jnp.asarray(random.standard_normal(shape), jnp.float32)
        self.qw = qc.quantize(self.w, scheme)
        leaves = [np.asarray(leaf) for leaf in self.qw.flatten()[0]]
        self.exact = oracle.exact_weight(*leaves, self.qw.scheme, shape[-1])
        self.x = jnp.asarray(random.standard_normal((rows, shape[-1])), jnp.float32)
        self.xs = np.asarray(self.x, np.float64)


def check(actual: Any, expected: Array, bound: float = 1e-8) -> None:
    """`actual` is within an NMSE of `expected`, that of "default" unless said otherwise, and has its shape."""
    got = np.asarray(actual, np.float64)
    assert got.shape == expected.shape
    error = float(((got - expected) ** 2).sum() / max((expected**2).sum(), 1e-300))
    assert error <= bound, f"NMSE {error:.1e}"


@pytest.fixture
def case() -> Any:
    """Makes a `Case`."""
    return Case


@pytest.fixture
def close() -> Any:
    """`check`."""
    return check
