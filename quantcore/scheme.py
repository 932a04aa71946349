"""How a weight is quantized: mode, bits and group size, with the packed shapes that follow from them."""

import operator
import re
import threading
from collections.abc import Mapping, Sequence
from types import EllipsisType, MappingProxyType
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeAlias

__all__ = ["BITS", "DEFAULTS", "GROUP_SIZES", "MODES", "Mode", "Scheme"]

Mode: TypeAlias = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

BITS: Final = (1, 2, 3, 4, 5, 6, 8)
"""Code widths that a scheme may have."""

GROUP_SIZES: Final = (16, 32, 64, 128, 256)
"""Group sizes that a scheme may have, beside None: one group per row."""

DEFAULTS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
)
"""Bits and group size of each mode where none are given; the microscaled modes have no others."""

MODES: Final = tuple(DEFAULTS)
"""Modes that a scheme may have."""

_WORD_BITS: Final = 32
_NAME: Final = re.compile(r"affine-int(?P<bits>[0-9]+)-(?:g(?P<group>[0-9]+)|(?P<row>row))")


class Scheme:
    """A quantization scheme. Equal schemes are one object, also across pickling, copies and threads.

    Each run of `group_size` consecutive elements along the grouped axis shares one scale. In the affine mode a weight
    is ``scale * code + bias``, with a bias per group as well. In the microscaled modes it is ``scale * element``, both
    small floats: elements of 4 bits are e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), those of 8 bits e4m3;
    scales are a byte each, a power of two (e8m0) in mxfp4 and mxfp8, and e4m3 in nvfp4. See the OCP Microscaling
    Formats (MX) specification 1.0, and MLX's ``mx.quantize``, for these.

    Parameters
    ----------
    mode : {"affine", "mxfp4", "mxfp8", "nvfp4"}
    bits : int, optional
        Bits per code: 1, 2, 3, 4 (the default), 5, 6 or 8. The microscaled modes fix it: 4, 8 and 4.
    group_size : int or None, optional
        Elements per group: 16, 32, 64 (the default), 128 or 256; None for one group per row. The microscaled modes fix
        it: 32, 32 and 16.

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
    >>> Scheme("mxfp4")
    Scheme('mxfp4')
    """

    __slots__ = ("__weakref__", "_name", "bits", "group_size", "mode")

    mode: str
    bits: int
    group_size: int | None
    _name: str

    _interned: ClassVar[dict[tuple[str, int, int | None], "Scheme"]] = {}
    _lock: ClassVar = threading.Lock()

    def __new__(
        cls,
        mode: Mode | str = "affine",
        bits: int | EllipsisType = ...,
        group_size: int | EllipsisType | None = ...,
    ) -> "Scheme":
        """Find or make the one scheme with these values."""
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(MODES)}")
        usual_bits, usual_group = DEFAULTS[mode]
        chosen_bits = usual_bits if isinstance(bits, EllipsisType) else _integer("bits", bits)
        chosen_group = (
            usual_group
            if isinstance(group_size, EllipsisType)
            else None
            if group_size is None
            else _integer("group_size", group_size)
        )
        _check(mode, chosen_bits, chosen_group)
        key = (mode, chosen_bits, chosen_group)
        with cls._lock:
            self = cls._interned.get(key)
            if self is None:
                self = object.__new__(cls)
                for name, value in zip(("mode", "bits", "group_size"), key, strict=True):
                    object.__setattr__(self, name, value)
                object.__setattr__(self, "_name", _name(*key))
                cls._interned[key] = self
            return self

    @classmethod
    def parse(cls, name: "str | Scheme") -> "Scheme":
        """Read a scheme back from its name.

        Parameters
        ----------
        name : str or Scheme
            ``"affine-int4-g64"``, ``"affine-int8-row"``, ``"mxfp4"``; a Scheme is returned as it is.
        """
        if isinstance(name, Scheme):
            return name
        if not isinstance(name, str):
            raise TypeError(f"scheme must be a Scheme or a string like 'affine-int4-g64', not {type(name).__name__}")
        if name in MODES and name != "affine":
            return cls(name)
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"can't read the scheme {name!r}; write it like 'affine-int4-g64', 'affine-int8-row' or 'mxfp4'"
            )
        group = None if match["row"] else int(match["group"])
        return cls("affine", int(match["bits"]), group)

    @property
    def has_biases(self) -> bool:
        """Whether groups have a bias, and scales are floats; otherwise scales are uint8."""
        return self.mode == "affine"

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
        """Shape of the scales, and of the biases where there are any, of a weight of this shape."""
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


def _check(mode: str, bits: int, group_size: int | None) -> None:
    if mode != "affine" and (bits, group_size) != DEFAULTS[mode]:
        fixed_bits, fixed_group = DEFAULTS[mode]
        raise ValueError(
            f"{mode} has {fixed_bits} bits in groups of {fixed_group}, not {bits} bits in groups of "
            f"{'a row' if group_size is None else group_size}; leave both out"
        )
    if bits not in BITS:
        raise ValueError(f"bits must be one of {_listed(BITS)}, not {bits}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {_listed(GROUP_SIZES)}, not {group_size}; one group per row is None in Scheme, "
            "and 'row' in quantize"
        )


def _name(mode: str, bits: int, group_size: int | None) -> str:
    if mode != "affine":
        return mode
    return f"{mode}-int{bits}-{'row' if group_size is None else f'g{group_size}'}"


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
