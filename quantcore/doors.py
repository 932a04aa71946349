"""Lazy doors to what a backend brings beyond its hooks: ``quantcore.torch``, ``quantcore.jax``.

A door is opened at the first attribute asked of it, through the entry-point group ``quantcore.doors``, so that neither
``import quantcore`` nor ``import quantcore.torch`` imports a framework, and the core knows no backend by name.
"""

from collections.abc import Callable
from typing import Any, Final

from quantcore import registry
from quantcore.errors import BackendUnavailableError

__all__ = ["DOORS", "door"]

DOORS: Final = ("jax", "torch")
"""Names of the doors: each a submodule of quantcore, and an entry point where a backend stands behind it."""

ENTRY_POINT_GROUP: Final = "quantcore.doors"


def door(name: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of the door module of that name.

    Raises
    ------
    BackendUnavailableError
        From the first attribute on, if no installed backend has such a door, or if its framework can't be imported.
    """

    def attribute(wanted: str) -> Any:
        if wanted == "__all__":
            return list(_opened(name).__all__)
        if wanted.startswith("__"):
            raise AttributeError(f"module 'quantcore.{name}' has no attribute {wanted!r}")
        public = _opened(name)
        if wanted not in public.__all__:
            raise AttributeError(
                f"module 'quantcore.{name}' has no attribute {wanted!r}; it has {', '.join(sorted(public.__all__))}"
            )
        return getattr(public, wanted)

    return attribute, lambda: sorted(_opened(name).__all__)


def _opened(name: str) -> Any:
    entry = next((entry for entry in registry.entry_points(group=ENTRY_POINT_GROUP) if entry.name == name), None)
    if entry is None:
        raise BackendUnavailableError(f"no installed backend is behind quantcore.{name}")
    try:
        return entry.load()
    except ImportError as error:
        raise BackendUnavailableError(
            f'quantcore.{name} can\'t be imported: {error}; pip install "quantcore-arrays[{name}]"'
        ) from error
