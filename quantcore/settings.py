"""What a block of code chose: a backend, a precision. Per context (thread or task), never global state."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, Final, get_args

from quantcore.hookspecs import Precision

__all__ = ["PRECISIONS", "Settings", "check_precision", "current", "use_precision"]

PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)


class Settings:
    """The choices in force; None where nothing was chosen. Equal ones are one object: dispatch keys on it."""

    __slots__ = ("backend", "precision")

    _interned: ClassVar[dict[tuple[str | None, Precision | None], "Settings"]] = {}

    def __init__(self, backend: str | None, precision: Precision | None) -> None:
        self.backend = backend
        self.precision = precision

    @classmethod
    def of(cls, backend: str | None = None, precision: Precision | None = None) -> "Settings":
        """The one object with these choices."""
        key = (backend, precision)
        found = cls._interned.get(key)
        return found if found is not None else cls._interned.setdefault(key, cls(*key))


_NOTHING: Final = Settings.of()

current: Final[ContextVar[Settings]] = ContextVar("quantcore_settings", default=_NOTHING)


def check_precision(op: str, precision: object) -> None:
    """Raise ValueError, in the name of an operation, unless `precision` names one."""
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(map(repr, PRECISIONS))}, not {precision!r}")


@contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Products inside the ``with`` block that name no precision of their own use this one.

    Parameters
    ----------
    precision : {"default", "highest", "fast"}
        Bound on the error, see :data:`quantcore.hookspecs.Precision`.

    Raises
    ------
    ValueError
        If there is no such precision.

    Examples
    --------
    >>> with use_precision("highest"):
    ...     y = dot(x, qw)
    """
    check_precision("use_precision", precision)
    token = current.set(Settings.of(current.get().backend, precision))
    try:
        yield
    finally:
        current.reset(token)
