"""How much the rows of a weight are alike: what the error of rounding x does to a product depends on it.

A product's error is the weight times the error of x. Seen through rows that have nothing in common it is an average,
and seldom far from its expectation; seen through rows that are multiples of one another, as those of a weight whose
mean is far from 0 nearly are, it is the same in all outputs, and often several times what is expected.
"""

from typing import Any, Final

import numpy as np

from quantcore import Scheme
from quantcore_backends.cpu_kernels.affine import scale
from quantcore_backends.cpu_kernels.bitstream import unpack

__all__ = ["independent_rows"]

Array = np.ndarray[Any, Any]

_ROWS: Final = 32
_COLUMNS: Final = 4096
"""What stands for all: rows from everywhere, and the first of their columns."""
_TOLERANCE: Final = 1.25
"""How many times as alike as random rows are some may be taken to be by chance."""


def independent_rows(packed: Array, scales: Array, biases: Array, scheme: Scheme, in_features: int) -> int:
    """As many independent rows would let the error of a product vary as much as a weight's do.

    For errors e of x of a given length and any direction, Σₙ(wₙ·e)² has a variance that is that of so many squares of
    normal variables: from the squared lengths of rows and the squared products of pairs of them, in a sample, less what
    random rows have.

    Parameters
    ----------
    packed : array, shape (N, W), uint32
    scales, biases : array, shape (N, G)
    scheme : Scheme
    in_features : int

    Returns
    -------
    int
        From 1 to N, and N where it can't be told: the weight isn't finite, say.
    """
    rows = packed.shape[0]
    if rows < 2:
        return max(1, rows)
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, _ROWS)).astype(np.intp))
    columns = min(in_features, _COLUMNS)
    words, groups, group = scheme.words(columns), scheme.groups(columns), scheme.group_size or columns
    codes = unpack(packed[chosen, :words], scheme.bits, columns).astype(np.float64)
    per_group = (part[chosen, :groups].astype(np.float64) for part in (scales, biases))
    dense = scale(codes, *(np.repeat(part, group, axis=1)[:, :columns] for part in per_group))
    with np.errstate(all="ignore"):
        products = np.square(dense @ dense.T)
        lengths = np.sqrt(np.diag(products))
        expected = lengths.mean() ** 2
        pairs = len(chosen) * (len(chosen) - 1)
        alike = (products.sum() - np.diag(products).sum()) / pairs / expected
        uneven = np.square(lengths).mean() / expected
        share = uneven / rows + (1 - 1 / rows) * alike - _TOLERANCE / columns
    return int(max(1.0, 1 / max(share, 1 / rows))) if np.isfinite(share) else rows
