"""The quantization settings in a config, their types checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from quantcore.formats.files import malformed

__all__ = ["Settings", "shortest_decimal"]

_LARGEST: Final = float(np.finfo(np.float32).max)


class Settings:
    """One object of a config file, whose values are asked for by type.

    Parameters
    ----------
    values : mapping
    file : Path
        The config file.
    place : str
        The object's name in it, for errors.
    """

    __slots__ = ("file", "place", "values")

    def __init__(self, values: Any, file: Path, place: str) -> None:
        self.file = file
        self.place = place
        if not isinstance(values, Mapping):
            malformed(file, f"{place} must be an object, not {type(values).__name__}")
        self.values: Mapping[str, Any] = values

    def malformed(self, what: str) -> NoReturn:
        """Raise the FormatError that names the place."""
        malformed(self.file, f"{self.place}: {what}")

    def integer(self, *names: str, default: int | None = None) -> int:
        """The integer of the first of these names that is there."""
        found = self._first(names, default)
        if type(found) is not int or not -(1 << 31) <= found < 1 << 31:
            self.malformed(f"{names[0]} must be an integer, not {str(found)[:40]!r}")
        return found

    def number(self, *names: str, default: float | None = None) -> float:
        """The positive number, of those that float32 holds, of the first of these names that is there."""
        found = self._first(names, default)
        if type(found) not in (int, float) or not 0 < found <= _LARGEST:
            self.malformed(f"{names[0]} must be a positive number, not {str(found)[:40]!r}")
        return float(found)

    def text(self, *names: str, default: str | None = None) -> str:
        """The string of the first of these names that is there."""
        found = self._first(names, default)
        if not isinstance(found, str):
            self.malformed(f"{names[0]} must be a string, not {str(found)[:40]!r}")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """The boolean of that name."""
        found = self.values.get(name, default)
        if not isinstance(found, bool):
            self.malformed(f"{name} must be true or false, not {str(found)[:40]!r}")
        return found

    def group_size(self, *names: str) -> int | None:
        """The group size of the first of these names that is there; -1 and null are one group per row."""
        if all(self.values.get(name) is None for name in names) and any(name in self.values for name in names):
            return None
        found = self.integer(*names)
        if found == -1:
            return None
        if found < 1:
            self.malformed(f"{names[0]} is {found}")
        return found

    def inner(self, name: str) -> "Settings":
        """The object of that name."""
        return Settings(self.values.get(name), self.file, f"{self.place}.{name}")

    def _first(self, names: tuple[str, ...], default: Any) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is None:
            self.malformed(f"{names[0]} is missing")
        return default


def shortest_decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where the file's float32 is 9.999999747378752e-06."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value
