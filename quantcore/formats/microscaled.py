"""What the readers of microscaled formats share: scales that must be numbers."""

from typing import Final

import numpy as np

from quantcore.formats.files import Array

__all__ = ["is_nan"]

_NAN: Final = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}


def is_nan(codes: Array, mode: str) -> Array:
    """Where scales, given by their codes in uint8, are NaN."""
    return np.isin(codes, _NAN[mode])
