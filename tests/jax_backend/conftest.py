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


_EVERY = {"TestJAX": 5, "TestJAXJitted": 11}
"""Of the kit's cases, which one in how many isn't `slow`: no divisor of how many dtypes or forms there are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark most of the kit `slow`: under jit it compiles for every shape. A fixed sample of every test is left."""
    seen: dict[str, int] = {}
    for item in items:
        cls = getattr(item, "cls", None)
        if cls is None or cls.__name__ not in _EVERY:
            continue
        function = f"{cls.__name__}.{item.originalname}"  # type: ignore[attr-defined]
        rare = cls.__name__ == "TestJAXJitted" and any(f"int{bits}-" in item.name for bits in (1, 2, 5, 6))
        place = seen.get(function, 0)
        if not rare:
            seen[function] = place + 1
        if rare or place % _EVERY[cls.__name__]:
            item.add_marker(pytest.mark.slow)
