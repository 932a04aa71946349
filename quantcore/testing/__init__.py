"""Testing backends: a float64 oracle that shares no code with any of them, and the conformance kit."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcore.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]


def __getattr__(name: str) -> Any:
    # The oracle is of use without pytest, which the kit needs.
    if name == "BackendConformance":
        from quantcore.testing.conformance import BackendConformance

        return BackendConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
