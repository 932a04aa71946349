"""What the tests of the core share: array libraries, a decoder of their own, a registry that may be spoiled."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

import quantcore as qc
from quantcore import registry

Array = np.ndarray[Any, Any]

EXAMPLE = "quantcore-thirdparty-example"
"""The distribution in tests/third_party_backend; test_third_party.py alone looks at it, in processes of its own."""


def _hide_example() -> None:
    """Keep the example's backends, two of them broken on purpose, from what the other tests count."""
    installed = registry.entry_points

    def others(*, group: str) -> list[Any]:
        return [e for e in installed(group=group) if e.dist is None or e.dist.name != EXAMPLE]

    hidden = [e.name for e in installed(group=registry.ENTRY_POINT_GROUP) if e.dist and e.dist.name == EXAMPLE]
    os.environ["QUANTCORE_DISABLE"] = ",".join(hidden)  # for the processes that tests start
    registry.entry_points = others


_hide_example()

settings.register_profile("quantcore", deadline=None, derandomize=True, database=None)
settings.load_profile("quantcore")


class Library:
    """An array library that the tests run on, and how NumPy's arrays get into it and out of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module: ModuleType = importlib.import_module("mlx.core" if name == "mlx" else name)
        self.dtypes = ("float32",) if name == "array_api_strict" else ("float32", "float16", "bfloat16")

    def __repr__(self) -> str:
        return self.name

    def array(self, values: Any) -> Any:
        """The library's array with the elements and the dtype of NumPy's."""
        values = np.asarray(values)
        if self.name == "numpy":
            return values
        if self.name == "mlx":
            if values.dtype == ml_dtypes.bfloat16:
                return self.module.array(values.view(np.uint16)).view(self.module.bfloat16)
            return self.module.array(values, dtype=getattr(self.module, values.dtype.name.replace("bool", "bool_")))
        return self.module.asarray(values)

    def numpy(self, array: Any) -> Array:
        """NumPy's array with the elements and the dtype of the library's."""
        assert isinstance(array, self.array_type), f"{type(array)} is no array of {self.name}"
        if self.name == "mlx" and array.dtype == self.module.bfloat16:
            return np.array(array.view(self.module.uint16)).view(ml_dtypes.bfloat16)
        return np.array(array) if self.name != "array_api_strict" else np.array(np.from_dlpack(array))

    @property
    def array_type(self) -> type:
        """The type of the library's arrays."""
        return np.ndarray if self.name == "numpy" else type(self.array(np.zeros(1, np.float32)))


@pytest.fixture(scope="session", params=["numpy", "mlx", "array_api_strict"])
def lib(request: pytest.FixtureRequest) -> Library:
    """Each array library in turn."""
    return Library(request.param)


@pytest.fixture(scope="session")
def libraries() -> dict[str, Library]:
    """All of them, by name."""
    return {name: Library(name) for name in ("numpy", "mlx", "array_api_strict")}


def _codes(row: Array, bits: int, count: int) -> list[int]:
    stream = int.from_bytes(np.ascontiguousarray(row, "<u4").tobytes(), "little")
    return [(stream >> (i * bits)) & ((1 << bits) - 1) for i in range(count)]


def _decode(qw: qc.QuantizedTensor) -> Array:
    """The exact weight in float64: codes read from one big integer a row, no rounding anywhere."""
    packed, scales, biases = (np.asarray(leaf) for leaf in qw.flatten()[0])
    leading = scales.shape[:-1]
    codes = [_codes(row, qw.scheme.bits, qw.in_features) for row in packed.reshape(-1, packed.shape[-1])]
    dense = np.asarray(codes, np.float64).reshape(*leading, qw.in_features)
    group = np.arange(qw.in_features) // (qw.scheme.group_size or qw.in_features)
    dense = dense * scales.astype(np.float64)[..., group] + biases.astype(np.float64)[..., group]
    return np.swapaxes(dense, -1, -2) if qw.transposed else dense


@pytest.fixture(scope="session")
def decode() -> Callable[[qc.QuantizedTensor], Array]:
    """Decode a small NumPy QuantizedTensor, exactly."""
    return _decode


def _close(result: Any, expected: Any, *operands: Any, bound: float = 1e-8) -> None:
    expected = np.asarray(expected, np.float64)
    assert result.shape == expected.shape
    error = np.asarray(result).astype(np.float64) - expected
    assert np.isfinite(error).all()
    spread = float((expected**2).sum())
    if operands:
        x, w = (np.asarray(operand).astype(np.float64) for operand in operands)
        spread = max(spread, float(expected.size * x.shape[-1] * (x**2).mean() * (w**2).mean()))
    assert (error**2).sum() <= bound * spread, f"NMSE {(error**2).sum() / (spread or 1):.1e}"


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Check that a product has the shape of `expected` and is as near as the default precision promises.

    With the product's operands, contracted along x's last axis, its expected size counts where the sum cancels.
    """
    return _close


@pytest.fixture
def spoil() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch for tests that change the set of backends: undone, and the registry put right, at the end."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    for name in [r.name for r in qc.backends() if r.origin == "register()"]:
        qc.unregister(name)
    qc.refresh()
    assert {r.name for r in qc.backends() if r.state is qc.State.READY} >= {"array_api", "mlx", "numpy"}


_SAMPLED = {
    "TestArrayAPIOnMLX": 5,  # the same code runs in full on array_api_strict
    "TestArrayAPIOnNumPy": 5,
    "TestArrayAPIOnTorch": 5,
    "TestJAX": 5,
    "TestJAXJitted": 11,  # compiles for every shape
    "TestTorchCompiled": 23,  # compiles each call
    "TestTorchTiles": 5,
}
"""Classes of the kit, with which one in how many cases of each test isn't slow: no number of dtypes or of forms."""
_RARE = {"TestJAXJitted": ("int1-", "int2-", "int5-", "int6-")}
"""What only the slow cases of a class have."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but a fixed sample of the classes above slow, the first case of each test being in it."""
    seen: dict[tuple[str, str], int] = {}
    for item in items:
        name = getattr(getattr(item, "cls", None), "__name__", "")
        if name not in _SAMPLED:
            continue
        test = (name, getattr(item, "originalname", item.name))
        rare = any(word in item.name for word in _RARE.get(name, ()))
        place = seen.get(test, 0)
        if not rare:
            seen[test] = place + 1
        if rare or place % _SAMPLED[name]:
            item.add_marker(pytest.mark.slow)
