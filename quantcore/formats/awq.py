"""AWQ checkpoints, GEMM layout: 4-bit codes, eight in a word along the output features, in AWQ's own order.

The formula and the order are those of AutoAWQ (awq/utils/packing_utils.py, `dequantize_gemm`): nibble i of a word is
column ``[0, 2, 4, 6, 1, 3, 5, 7][i]`` of its eight, and a weight is ``(code - zero) * scale``.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from quantcore.bitstream import pack
from quantcore.errors import UnsupportedError
from quantcore.formats.affine import FLOATS, Parts, check_finite, from_zero_points, joined, scheme_of
from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings
from quantcore.formats.files import Array, Stored
from quantcore.memory import aligned_empty
from quantcore.tensor import QuantizedTensor

__all__ = ["SUFFIXES", "entries"]

SUFFIXES: Final = ("qweight", "qzeros", "scales")

_ORDER: Final = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_PER_WORD: Final = 8
_TILE: Final = 1 << 21


def entries(tensors: Mapping[str, Stored], settings: Settings, *, exact: bool) -> dict[str, Entry]:
    """The quantized weights of an AWQ checkpoint.

    Raises
    ------
    FormatError, UnsupportedError
        If the config or a tensor isn't as AutoAWQ writes it, or its layout isn't the GEMM one.
    """
    bits = settings.integer("bits", "w_bit")
    version = settings.text("version", default="gemm").lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedError(f"{settings.file}: AWQ of {bits} bits, version {version!r}; read is 4 bits, 'gemm'")
    group = settings.group_size("group_size", "q_group_size")
    return {name: _entry(parts, group, exact) for name, parts in joined(tensors, "qweight", SUFFIXES).items()}


def _entry(parts: Parts, group_size: int | None, exact: bool) -> Entry:
    qweight = parts.need("qweight", "int32", rank=2)
    scales = parts.need("scales", *FLOATS, rank=2)
    zeros = parts.need("qzeros", "int32", rank=2)
    in_features, out = qweight.shape[0], qweight.shape[1] * _PER_WORD
    if in_features == 0 or out == 0:
        qweight.malformed(f"shape {qweight.shape} is empty")
    scheme = scheme_of(qweight, 4, group_size, in_features)
    groups = scheme.groups(in_features)
    if scales.shape != (groups, out) or not scheme.divides(in_features):
        scales.malformed(f"shape {scales.shape}; a weight of shape {(out, in_features)}, {scheme}, has {(groups, out)}")
    if zeros.shape != (groups, out // _PER_WORD):
        zeros.malformed(f"shape {zeros.shape}; expected {(groups, out // _PER_WORD)}")

    def read() -> QuantizedTensor:
        packed = aligned_empty((out, scheme.words(in_features)), np.uint32)
        words = qweight.array().view("<u4")
        step = max(1, _TILE // in_features // _PER_WORD)
        for start in range(0, out // _PER_WORD, step):
            codes = _columns(words[:, start : start + step])
            packed[start * _PER_WORD : (start + step) * _PER_WORD] = pack(np.ascontiguousarray(codes.T), 4)
        scale = scales.array()
        check_finite(scales, scale)
        zero = _columns(zeros.array().view("<u4"))
        scale, zero = np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)
        return from_zero_points(qweight, packed, scale, zero, scheme, in_features, exact=exact)

    return parts.entry("AWQ", (out, in_features), scheme, scales.dtype_name, read)


def _columns(words: Array) -> Array:
    """Codes (n, 8·m) in order of their columns, from words (n, m)."""
    found = np.empty((*words.shape, _PER_WORD), np.uint8)
    for nibble, column in enumerate(_ORDER):
        found[..., column] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
    return found.reshape(len(words), -1)
