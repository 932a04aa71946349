"""How a weight is quantized: mode, bits and group size, with the packed shapes that follow from them."""

import operator
import re
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal, NoReturn

__all__ = ["BITS", "GROUP_SIZES", "Scheme"]

BITS: Final = (1, 2, 3, 4, 5, 6, 8)
"""Code widths that a scheme may have."""

GROUP_SIZES: Final = (16, 32, 64, 128, 256)
"""Group sizes that a scheme may have, beside None: one group per row."""

_WORD_BITS: Final = 32
_NAME: Final = re.compile(r"(?P<mode>[a-z0-9]+)-int(?P<bits>[0-9]+)-(?:g(?P<group>[0-9]+)|(?P<row>row))")


class Scheme:
    """A quantization scheme. Equal schemes are one object, also across pickling, copies and threads.

    Every weight is ``scale * code + bias``, where each run of `group_size` consecutive elements along the grouped
    axis shares one scale and one bias.

    Parameters
    ----------
    mode : str
        ``"affine"``: unsigned integer codes, a scale and a bias per group.
    bits : int
        Bits per code: 1, 2, 3, 4, 5, 6 or 8.
    group_size : int or None
        Elements per group: 16, 32, 64, 128 or 256; None for one group per row.

    Raises
    ------
    TypeError, ValueError
        If an argument isn't one of the above.

    Examples
    --------
    >>> Scheme("affine", 4, 64)
    Scheme('affine-int4-g64')
    >>> Scheme.parse("affine-int8-row") is Scheme(bits=8, group_size=None)
    True
    """

    __slots__ = ("__weakref__", "_name", "bits", "group_size", "mode")

    mode: str
    bits: int
    group_size: int | None
    _name: str

    _interned: ClassVar[dict[tuple[str, int, int | None], "Scheme"]] = {}
    _lock: ClassVar = threading.Lock()

    def __new__(cls, mode: Literal["affine"] | str = "affine", bits: int = 4, group_size: int | None = 64) -> "Scheme":
        """Find or make the one scheme with these values."""
        if mode != "affine":
            raise ValueError(f"unknown mode {mode!r}; the mode is 'affine'")
        bits = _integer("bits", bits)
        if bits not in BITS:
            raise ValueError(f"bits must be one of {_listed(BITS)}, not {bits}")
        if group_size is not None:
            group_size = _integer("group_size", group_size)
            if group_size not in GROUP_SIZES:
                raise ValueError(
                    f"group_size must be one of {_listed(GROUP_SIZES)}, or None for one group per row, not {group_size}"
                )
        key = (mode, bits, group_size)
        with cls._lock:
            self = cls._interned.get(key)
            if self is None:
                self = object.__new__(cls)
                for name, value in zip(("mode", "bits", "group_size"), key, strict=True):
                    object.__setattr__(self, name, value)
                group = "row" if group_size is None else f"g{group_size}"
                object.__setattr__(self, "_name", f"{mode}-int{bits}-{group}")
                cls._interned[key] = self
            return self

    @classmethod
    def parse(cls, name: "str | Scheme") -> "Scheme":
        """Read a scheme back from its name.

        Parameters
        ----------
        name : str or Scheme
            ``"affine-int4-g64"``, ``"affine-int8-row"``; a Scheme is returned as it is.
        """
        if isinstance(name, Scheme):
            return name
        if not isinstance(name, str):
            raise TypeError(f"scheme must be a Scheme or a string like 'affine-int4-g64', not {type(name).__name__}")
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"can't read the scheme {name!r}; write it like 'affine-int4-g64' or 'affine-int8-row'")
        group = None if match["row"] else int(match["group"])
        return cls(match["mode"], int(match["bits"]), group)

    def words(self, in_features: int) -> int:
        """uint32 words that a packed row of `in_features` codes takes; spare bits at its end are zero."""
        return -(-in_features * self.bits // _WORD_BITS)

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` elements; the last one may be short (padded weights)."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def divides(self, in_features: int) -> bool:
        """Whether rows of `in_features` elements are made of whole groups."""
        return self.group_size is None or in_features % self.group_size == 0

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the uint32 array that holds the codes of a weight of this shape."""
        return (*shape[:-1], self.words(shape[-1]))

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales, and of the biases, of a weight of this shape."""
        return (*shape[:-1], self.groups(shape[-1]))

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Scheme({str(self)!r})"

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a Scheme is immutable; make a new one to change {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a Scheme is immutable")

    def __reduce__(self) -> tuple[type["Scheme"], tuple[str, int, int | None]]:
        return (Scheme, (self.mode, self.bits, self.group_size))


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
