"""What a run of the conformance kit did, as properties of pytest's reports: they survive xdist."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeAlias

from quantcore.testing import oracle

__all__ = ["PROPERTY", "Entry", "Outcome", "Tally", "failures", "lines", "tally"]

PROPERTY: Final = "quantcore"
"""Name of the user property that holds an `Entry`."""


Outcome: TypeAlias = Literal["ran", "measured", "refused", "inapplicable"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One call, what was measured of its result, or one case that could not be made.

    Attributes
    ----------
    backend, library, op : str
    outcome : {"ran", "measured", "refused", "inapplicable"}
        refused: by the backend's `supports`; inapplicable: the library has no such dtype or memory form.
    reason : str
    precision : str
    error : float
        NMSE of the worst row, where measured.
    """

    backend: str
    library: str
    op: str
    outcome: Outcome
    reason: str = ""
    precision: str = ""
    error: float = 0.0

    def as_property(self) -> tuple[str, dict[str, Any]]:
        """The entry in the form that pytest passes on."""
        return PROPERTY, asdict(self)


@dataclass
class Tally:
    """Entries of one backend on one library, counted."""

    ran: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    inapplicable: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        if entry.outcome == "ran":
            self.ran[entry.op] += 1
        elif entry.outcome == "measured":
            self.worst[entry.precision] = max(entry.error, self.worst.get(entry.precision, 0.0))
        elif entry.outcome == "refused":
            self.refused[entry.op][entry.reason] += 1
        else:
            self.inapplicable[entry.reason] += 1


def tally(properties: Iterable[tuple[str, object]]) -> dict[tuple[str, str], Tally]:
    """Count the entries among user properties, by backend and library."""
    found: dict[tuple[str, str], Tally] = {}
    for name, value in properties:
        if name == PROPERTY and isinstance(value, Mapping):
            entry = Entry(**value)
            found.setdefault((entry.backend, entry.library), Tally()).add(entry)
    return found


def failures(found: Mapping[tuple[str, str], Tally]) -> list[str]:
    """Why a run proves nothing: an op whose every call was refused."""
    return [
        f"backend {backend!r} refused every call of {op}: {'; '.join(counted.refused[op])}"
        for (backend, _), counted in found.items()
        for op in ("quantize", "dequantize", "dot")
        if counted.refused.get(op) and not counted.ran[op]
    ]


def lines(found: Mapping[tuple[str, str], Tally]) -> list[str]:
    """The summary, for people."""
    shown: list[str] = []
    for (backend, library), counted in sorted(found.items()):
        shown += ["", f"backend {backend} on {library} arrays", f"  {'op':<12}{'ran':>7}{'refused':>9}"]
        for op in sorted({*counted.ran, *counted.refused}):
            shown.append(f"  {op:<12}{counted.ran[op]:>7}{sum(counted.refused.get(op, {}).values()):>9}")
        for op, reasons in sorted(counted.refused.items()):
            shown += [f"  {op} refused {count} times: {reason}" for reason, count in _alike(reasons)]
        shown += [f"  not applicable {n} times: {reason}" for reason, n in counted.inapplicable.most_common()]
        for precision, bound in oracle.BOUNDS.items():
            if precision in counted.worst:
                worst = counted.worst[precision]
                shown.append(f"  precision {precision:<8} worst NMSE of a row {worst:.1e} (bound {bound:.0e})")
    return shown


def _alike(reasons: Counter[str]) -> list[tuple[str, int]]:
    """Reasons that differ in their numbers only made one, the commonest of each standing for it."""
    kinds: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for reason, count in reasons.most_common():
        kinds[re.sub(r"\d+", "#", reason)].append((reason, count))
    return [
        (alike[0][0] + (" (or other numbers)" if len(alike) > 1 else ""), sum(count for _, count in alike))
        for alike in kinds.values()
    ]
