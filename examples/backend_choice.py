"""Which backends the demo runs on: those asked for by name, or those of the usual ones that are ready."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import quantcore
from quantcore import BackendRecord, QuantcoreError, State

USUAL = ("numpy", "mlx")


class BackendChoiceError(LookupError):
    """A backend asked for by name can't run; the message says why, and how to install it."""


@dataclass(frozen=True)
class Choice:
    """A backend to run on, and the library whose arrays it computes on."""

    backend: str
    library: str


def named(names: Sequence[str]) -> tuple[Choice, ...]:
    """Choose the backends of these names, all of which must be ready."""
    records = _settled(names)
    for name in names:
        if name not in records:
            raise BackendChoiceError(
                f"--backend: no backend is called {name!r}; there are {', '.join(sorted(records))}"
            )
        if records[name].state != State.READY:
            raise BackendChoiceError(f"--backend: {describe(records[name])}")
    return tuple(_choice(records[name]) for name in names)


def usual() -> tuple[tuple[Choice, ...], tuple[str, ...]]:
    """Choose NumPy and MLX as far as they are ready; return one line for each that isn't, too."""
    found = _settled(USUAL)
    records = [found[name] for name in USUAL if name in found]
    ready = tuple(_choice(record) for record in records if record.state == State.READY)
    absent = tuple(describe(record) for record in records if record.state != State.READY)
    return ready, absent


def describe(record: BackendRecord) -> str:
    """Say in one line why a backend can't run, and how to install what it lacks."""
    hint = f"; {record.install_hint}" if record.install_hint else ""
    return f"backend {record.name!r} is {record.state}: {record.reason}{hint}"


def _settled(names: Sequence[str]) -> dict[str, BackendRecord]:
    """Return all backends by name, once the named ones have imported their frameworks: a broken one shows only then."""
    for name in names:
        with suppress(QuantcoreError), quantcore.use_backend(name):
            pass
    return {record.name: record for record in quantcore.backends()}


def _choice(record: BackendRecord) -> Choice:
    return Choice(record.name, "numpy" if record.library == "*" else record.library)
