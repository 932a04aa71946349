"""Which kernel computes a product on the CPU, by precision and rows of x: one table."""

import warnings
from functools import cache
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from quantcore import PerformanceWarning, Scheme
from quantcore_backends.cpu_kernels.compiled import FEW_ROWS
from quantcore_backends.jax_backend import tiles
from quantcore_backends.jax_backend.ffi import targets

__all__ = ["on_cpu"]

Array = Any

_ANY: Final = 1 << 62
_TABLE: Final = (
    # exact, one group a row, most rows of x, kernel
    (True, True, _ANY, "few_rows"),
    (True, False, FEW_ROWS, "few_rows"),
    (False, True, FEW_ROWS, "few_rows"),
    (False, False, FEW_ROWS, "few_rows"),
)
"""The first line that fits has it; where none does, rows are made dense by the compiled target for XLA's own dot."""


def on_cpu(
    x: Array,
    leaves: tuple[Array, Array, Array],
    which: Array,
    scheme: Scheme,
    columns: int,
    *,
    along_rows: bool,
    exact: bool,
) -> Array:
    """The product on one CPU device; arguments and result are those of `tiles.product`."""
    if x.dtype != np.float32 or _warned_of(targets.unusable()):
        return tiles.product(x, leaves, which, scheme, columns, along_rows=along_rows, exact=exact)
    if _kernel(exact, scheme.group_size is None and not along_rows, x.shape[1]) == "few_rows":
        return targets.product(x, leaves, which, scheme, columns, along_rows=along_rows)

    def decode(leaves: tuple[Array, ...], weight: Array, first: Array, rows: int) -> Array:
        return targets.decode(leaves, jnp.stack([weight, first]), rows, scheme, columns)

    return tiles.product(x, leaves, which, scheme, columns, along_rows=along_rows, exact=exact, decode=decode)


@cache
def _warned_of(reason: str) -> bool:
    """Whether there is a reason not to use the compiled targets; said once."""
    if reason:
        message = f"products inside jit are computed without the compiled CPU kernels, more slowly: {reason}"
        warnings.warn(message, PerformanceWarning, stacklevel=2)
    return bool(reason)


def _kernel(exact: bool, whole_row: bool, rows_of_x: int) -> str:
    for for_exact, for_whole_row, most, kernel in _TABLE:
        if (for_exact, for_whole_row) == (exact, whole_row) and rows_of_x <= most:
            return kernel
    return "tiles"
