"""Whether all groups of a weight have one zero point: then its scales say all that its biases do."""

import math
from typing import Any, Final, TypeAlias

import numpy as np

from quantcore_backends.cpu_kernels.weights import FLOAT32, row_tiles

__all__ = ["common_zero_point"]

Array: TypeAlias = np.ndarray[Any, Any]

_MOST: Final = 128


def common_zero_point(scales: Array, biases: Array) -> int:
    """The power of two z with ``biases == -z * scales``, or 0 where there is none.

    So are weights of symmetric formats: codes of b bits stand for numbers around ``2**(b - 1)``. Of a power of two the
    product is exact in every float type, so that kernels may take the one for the other to the last bit.

    Parameters
    ----------
    scales, biases : array, shape (N, G), float32, float16 or bfloat16

    Returns
    -------
    int
        From 1 to 128, or 0; 0 too where a scale is NaN.
    """
    found = 0
    rows, groups = scales.shape
    # The first row tells of nearly all others that they have none.
    for part in (slice(0, 1), *row_tiles(rows, groups)):
        scale, bias = scales[part].astype(FLOAT32, copy=False), biases[part].astype(FLOAT32, copy=False)
        if not found and scale.any():
            found = _ratio(scale, bias)
            if not found:
                return 0
        if not (bias == np.float32(-found) * scale).all():
            return 0
    return found


def _ratio(scale: Array, bias: Array) -> int:
    """Minus a bias over its scale, that of the largest, where it is a power of two up to `_MOST`; else 0."""
    at = np.unravel_index(np.argmax(np.abs(scale)), scale.shape)
    ratio = -float(bias[at]) / float(scale[at])
    return int(ratio) if 1 <= ratio <= _MOST and math.frexp(ratio)[0] == 0.5 else 0
