"""Which kernel computes a product on the CPU, by precision and rows of x: one table."""

import warnings
from functools import cache
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from quantcore import PerformanceWarning, Scheme
from quantcore_backends.cpu_kernels import integer
from quantcore_backends.cpu_kernels.compiled import FEW_ROWS
from quantcore_backends.jax_backend import tiles
from quantcore_backends.jax_backend.ffi import targets

__all__ = ["XLA_TILES", "described", "on_cpu"]

Array = Any

_ANY: Final = 1 << 62
_TABLE: Final = (
    # precision, how the weight's elements share scales, most rows of x, kernel
    ("highest", "row", _ANY, "few_rows"),
    ("highest", "groups", _ANY, "rounded"),
    ("default", "row", _ANY, "rounded"),
    ("default", "groups", _ANY, "rounded"),
    ("fast", "row", _ANY, "rounded"),
    ("fast", "groups", _ANY, "rounded"),
    ("", "", FEW_ROWS, "few_rows"),
)
"""The first line that fits has it, "" being anything; else a target makes rows dense for XLA's own dot."""

XLA_TILES: Final = "XLA makes tiles of the weight dense and multiplies them"
_FLOATS: Final = "a compiled kernel multiplies x in float32"
_WIDTHS: Final = {
    (integer.FLOATS,): _FLOATS,
    (24,): "a compiled kernel multiplies x rounded to 24-bit integers",
    (16,): "a compiled kernel multiplies x rounded to 16-bit integers",
    (8, 16): "a compiled kernel multiplies x rounded to 8-bit integers, or to 16-bit ones where those lose too much",
    (): _FLOATS,
}


def on_cpu(
    x: Array,
    leaves: tuple[Array, Array, Array],
    which: Array,
    scheme: Scheme,
    columns: int,
    *,
    along_rows: bool,
    precision: str,
) -> Array:
    """The product on one CPU device; arguments and result are those of `tiles.product`."""
    if x.dtype != np.float32 or _warned_of(targets.unusable()):
        return tiles.product(x, leaves, which, scheme, columns, along_rows=along_rows, precision=precision)
    kernel = _kernel(precision, _sharing(scheme, along_rows), x.shape[1])
    if kernel != "tiles":
        width = integer.WIDTHS[precision] if kernel == "rounded" else None
        return targets.product(x, leaves, which, scheme, columns, along_rows=along_rows, width=width)

    def decode(leaves: tuple[Array, ...], weight: Array, first: Array, rows: int) -> Array:
        return targets.decode(leaves, jnp.stack([weight, first]), rows, scheme, columns)

    return tiles.product(x, leaves, which, scheme, columns, along_rows=along_rows, precision=precision, decode=decode)


def described(scheme: Scheme, dtype: np.dtype[Any], rows: int, *, along_rows: bool, precision: str) -> str:
    """What `on_cpu` does with so many rows of x in that dtype, in words, with the reason where it is slower."""
    reason = targets.unusable()
    if dtype != np.float32:
        reason = f"the compiled kernels multiply in float32, not in {dtype.name}"
    if reason:
        return f"{XLA_TILES}, more slowly: {reason}"
    kernel = _kernel(precision, _sharing(scheme, along_rows), rows)
    if kernel == "rounded":
        return _WIDTHS[integer.widths(scheme, integer.WIDTHS[precision], tiled=rows > integer.UNTILED_ROWS)]
    if kernel == "few_rows":
        return _FLOATS
    return (
        f"a compiled kernel makes tiles of the weight dense and XLA multiplies them, since x has {rows} rows and a "
        f"kernel alone multiplies at most {_most(precision, _sharing(scheme, along_rows))}"
    )


@cache
def _warned_of(reason: str) -> bool:
    """Whether there is a reason not to use the compiled targets; said once."""
    if reason:
        message = f"products inside jit are computed without the compiled CPU kernels, more slowly: {reason}"
        warnings.warn(message, PerformanceWarning, stacklevel=2)
    return bool(reason)


def _sharing(scheme: Scheme, along_rows: bool) -> str:
    """What the table tells apart; "other" where the sum is along the rows, or there are no kernels on integers."""
    if along_rows:
        return "other"
    if scheme.group_size is None:
        return "row"
    return "groups" if integer.serves(scheme) else "other"


def _most(precision: str, sharing: str) -> int:
    """Rows of x up to which a kernel alone multiplies."""
    return max(line[2] for line in _TABLE if line[0] in ("", precision) and line[1] in ("", sharing))


def _kernel(precision: str, sharing: str, rows_of_x: int) -> str:
    for for_precision, for_sharing, most, kernel in _TABLE:
        if for_precision in ("", precision) and for_sharing in ("", sharing) and rows_of_x <= most:
            return kernel
    return "tiles"
