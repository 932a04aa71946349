"""The conformance kit on each of the project's backends, on each kind of array that it takes."""

from quantcore.testing import BackendConformance


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
