"""The conformance kit on each of the project's backends, on each kind of array that it takes."""

from collections.abc import Iterator

import pytest

import quantcore as qc
from quantcore.testing import BackendConformance
from quantcore.testing.bench import Bench

from .torch_variants import CompiledBench, Tiles


class TestNumPy(BackendConformance):
    backend = "numpy"


class TestMLX(BackendConformance):
    backend = "mlx"  # on its default device: the GPU of a Mac, else the CPU


class TestArrayAPIOnArrayAPIStrict(BackendConformance):
    backend = "array_api"
    library = "array_api_strict"


class TestArrayAPIOnNumPy(BackendConformance):
    backend = "array_api"
    library = "numpy"


class TestArrayAPIOnMLX(BackendConformance):
    backend = "array_api"
    library = "mlx"


class TestTorch(BackendConformance):
    backend = "torch"


class TestArrayAPIOnTorch(BackendConformance):
    backend = "array_api"
    library = "torch"


class TestTorchCompiled(BackendConformance):
    backend = "torch"

    @pytest.fixture
    def bench(self, request: pytest.FixtureRequest) -> Bench:
        """The kit's bench, whose calls are compiled."""
        return CompiledBench("torch", "torch", lambda e: request.node.user_properties.append(e.as_property()))


class TestTorchTiles(BackendConformance):
    backend = "torch-tiles"
    library = "torch"

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        qc.register(Tiles())
        yield
        qc.unregister("torch-tiles")
