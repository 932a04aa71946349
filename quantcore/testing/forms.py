"""Memory forms: the same elements, laid out otherwise."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from quantcore.testing.bench import Bench

__all__ = ["FORMS", "in_form"]

Array: TypeAlias = np.ndarray[Any, Any]


def _every_other(values: Array) -> Array:
    spread = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
    spread[..., ::2] = values
    return spread


def _read_only(values: Array) -> Array:
    copy = values.copy()
    copy.flags.writeable = False
    return copy


def _unaligned(values: Array) -> Array:
    room = np.zeros(values.nbytes + 1, np.uint8)
    room[1:] = np.frombuffer(values.tobytes(), np.uint8)
    return room[1:].view(values.dtype).reshape(values.shape)


_OF_NUMPY: Final[Mapping[str, Callable[[Array], Array]]] = MappingProxyType(
    {
        "read-only": _read_only,
        "byte-swapped": lambda values: values.astype(values.dtype.newbyteorder()),
        "reversed twice": lambda values: np.ascontiguousarray(values[..., ::-1, ::-1])[..., ::-1, ::-1],
        "column by column": np.asfortranarray,
        "unaligned": _unaligned,
    }
)

_OF_ALL: Final[Mapping[str, Callable[[Bench, Array], Any]]] = MappingProxyType(
    {
        "every other column": lambda bench, values: bench.array(_every_other(values))[..., ::2],
        "every other row": lambda bench, values: bench.array(np.repeat(values, 2, axis=-2))[..., ::2, :],
        "transposed": lambda bench, values: bench.swapped(
            bench.array(np.ascontiguousarray(np.swapaxes(values, -1, -2)))
        ),
    }
)

FORMS: Final = (*_OF_ALL, *_OF_NUMPY)
"""Names of the memory forms; some are NumPy's alone."""


def in_form(bench: Bench, form: str, values: Array) -> Any:
    """The library's array with these elements in that memory form; skips where the library has no such form."""
    if form in _OF_ALL:
        return _OF_ALL[form](bench, values)
    if bench.library != "numpy":
        bench.inapplicable(f"{form} arrays are NumPy's alone")
    return _OF_NUMPY[form](values)
