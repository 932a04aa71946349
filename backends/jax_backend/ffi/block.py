"""What stands where in the memory that handlers, bodies and jobs share: 64-bit integers, in the order given here."""

from typing import Final

__all__ = ["FIELDS", "OPERATIONS", "SPEC", "in_block", "in_spec"]

OPERATIONS: Final = ("one_row", "few_rows", "along_rows", "decode")
"""What the bodies do, in the order of their numbers."""

SPEC: Final = ("body", "kind", "bits", "columns", "group", "span", "flush", "along_rows", "width")
"""The integers of a call's attribute.

`group` is 0 where the row is one; `width` is that of the integers that x is rounded to at first, 0 for none.
"""

FIELDS: Final = (
    "x",
    "packed",
    "scales",
    "biases",
    "which",
    "out",
    "sums",
    "tail",
    "count",
    "rows",
    "columns",
    "stack",
    "span",
    "flush",
    "row",
    "scale_row",
    "step",
    "safe",
    "chunks",
    "start",
    "height",
)
"""The integers in a block of operands.

`count` rows of x a product; `rows` and `columns` of each of the `stack` stored weights; rows of the last weight from
`safe` on are read from `tail`, where there is memory behind them; `chunks` a product, of `height` rows or spans.
"""


def in_spec(*names: str) -> tuple[int, ...]:
    """At how many bytes in an attribute integers of these names stand."""
    return tuple(8 * SPEC.index(name) for name in names)


def in_block(*names: str) -> tuple[int, ...]:
    """At how many bytes in a block of operands integers of these names stand."""
    return tuple(8 * FIELDS.index(name) for name in names)
