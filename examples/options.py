"""What the demo's options allow, and one line of explanation for whatever they don't."""

from __future__ import annotations

from collections.abc import Sequence

from quantcore.scheme import BITS, GROUP_SIZES


class OptionError(ValueError):
    """An option has a value that isn't allowed; the message names those that are."""


def parse_bits(text: str) -> int:
    """Read ``--bits``."""
    if text not in map(str, BITS):
        raise OptionError(f"--bits must be one of {_listed(BITS)}; got {text!r}")
    return int(text)


def parse_group_size(text: str) -> int | None:
    """Read ``--group-size``; ``row`` is one group for the whole row."""
    if text == "row":
        return None
    if text not in map(str, GROUP_SIZES):
        raise OptionError(f"--group-size must be one of {_listed(GROUP_SIZES)}, row; got {text!r}")
    return int(text)


def parse_top(text: str, available: int) -> int:
    """Read ``--top``, a number of sentences."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= available):
        raise OptionError(f"--top must be a whole number from 1 to {available}; got {text!r}")
    return int(text)


def parse_text(text: str, what: str) -> str:
    """Read a query or a prompt."""
    if not text.strip():
        raise OptionError(f"the {what} must not be empty")
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Read ``--backend``: names between commas, each taken once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise OptionError("--backend must name at least one backend, such as numpy,mlx,jax")
    return names


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
