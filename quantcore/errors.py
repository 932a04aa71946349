"""The errors and warnings of quantcore.

Each subclasses the standard exception that a caller would expect, so that code which knows nothing of quantcore
still catches it. A message names the operation, the shapes, the scheme, each backend's reason and the fix.
Arguments that are wrong in themselves raise the plain ``TypeError``, ``ValueError`` or ``IndexError``.
"""

__all__ = [
    "BackendNotFoundError",
    "BackendUnavailableError",
    "BackendWarning",
    "FormatError",
    "InexactConversionError",
    "NoBackendError",
    "PerformanceWarning",
    "PluginValidationError",
    "QuantcoreError",
    "UnsupportedError",
]


class QuantcoreError(Exception):
    """Base class of every error that quantcore defines."""


class BackendNotFoundError(QuantcoreError, LookupError):
    """No backend of that name is installed or registered."""


class BackendUnavailableError(QuantcoreError, ImportError):
    """The backend is installed, but it is disabled, broken, or what it requires can't be imported."""


class NoBackendError(QuantcoreError, TypeError):
    """No backend takes arrays of this type."""


class UnsupportedError(QuantcoreError, NotImplementedError):
    """Backends take these arrays, but none supports this call."""


class PluginValidationError(QuantcoreError, TypeError):
    """A plugin doesn't keep the contract of :mod:`quantcore.hookspecs`."""


class FormatError(QuantcoreError, ValueError):
    """A file isn't what its format says it must be."""


class InexactConversionError(QuantcoreError, ValueError):
    """A conversion would change values, and the caller asked for an exact one."""


class PerformanceWarning(UserWarning):
    """A slower backend of the same array library computes what the preferred one refused."""


class BackendWarning(UserWarning):
    """A backend is broken and was left out; everything else works."""
