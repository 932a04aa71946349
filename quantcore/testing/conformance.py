"""The conformance kit: what every backend is held to.

Run it on an installed backend with ::

    pytest -p quantcore.testing.plugin --pyargs quantcore.testing.conformance --quantcore-backend NAME

or in a test module of your own, where a backend may be registered by hand::

    from quantcore.testing import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"

Cases that the backend's `supports` refuses are skipped, with its reason; a backend that refuses all of an op fails.
Load the plugin ``quantcore.testing.plugin`` for a summary of what ran, what was refused, and the errors measured.
"""

import importlib.util
from typing import ClassVar

import pytest

for _part in ("bench", "contract_tests", "encoding_tests", "indexing_tests", "microscaled_tests", "product_tests"):
    pytest.register_assert_rewrite(f"quantcore.testing.{_part}")

import quantcore as qc  # noqa: E402
from quantcore.testing.bench import Bench  # noqa: E402
from quantcore.testing.contract_tests import DispatchTests, ErrorTests, LayoutTests, TransferTests  # noqa: E402
from quantcore.testing.encoding_tests import DequantizeTests, QuantizeTests  # noqa: E402
from quantcore.testing.indexing_tests import GatherDotTests, TakeTests  # noqa: E402
from quantcore.testing.microscaled_tests import MicroscaledTests  # noqa: E402
from quantcore.testing.product_tests import ContractionTests, DotTests  # noqa: E402
from quantcore.testing.report import Entry  # noqa: E402

__all__ = ["BackendConformance"]


class BackendConformance(
    DispatchTests,
    QuantizeTests,
    DequantizeTests,
    DotTests,
    ContractionTests,
    TakeTests,
    GatherDotTests,
    MicroscaledTests,
    LayoutTests,
    TransferTests,
    ErrorTests,
):
    """All tests of the kit; subclass it under a name that pytest collects, and name your backend.

    Attributes
    ----------
    backend : str
        Name of an installed or registered backend.
    library : str, optional
        The array library to test it on, for a backend that takes any; by default the backend's own, and
        array-api-strict, else NumPy, for a universal one.
    """

    backend: ClassVar[str | None] = None
    library: ClassVar[str | None] = None

    @pytest.fixture
    def bench(self, request: pytest.FixtureRequest) -> Bench:
        """The backend under test."""
        name = self.backend
        if name is None:
            pytest.fail(f"{type(self).__name__} names no backend: set its class attribute `backend`", pytrace=False)
        return Bench(
            name,
            self.library or _library_of(name),
            lambda entry: _note(request.node, entry),
        )


class TestConformance(BackendConformance):
    """The kit on the backend that ``--quantcore-backend`` names."""

    @pytest.fixture
    def bench(self, request: pytest.FixtureRequest) -> Bench:
        """The backend under test."""
        name = request.config.getoption("--quantcore-backend", None)
        if name is None:
            pytest.exit(
                "say which backend to test: -p quantcore.testing.plugin --quantcore-backend NAME",
                returncode=pytest.ExitCode.USAGE_ERROR,
            )
        library = request.config.getoption("--quantcore-library", None) or _library_of(name)
        return Bench(name, library, lambda entry: _note(request.node, entry))


def _note(item: pytest.Item, entry: Entry) -> None:
    item.user_properties.append(entry.as_property())


def _library_of(backend: str) -> str:
    """The library of a backend's arrays; for a universal one, one that is installed."""
    library = next((record.library for record in qc.backends() if record.name == backend), "")
    if library != "*":
        return library
    return "array_api_strict" if importlib.util.find_spec("array_api_strict") else "numpy"
