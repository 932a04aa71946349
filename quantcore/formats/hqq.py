"""HQQ checkpoints in safetensors, groups along axis 1.

As HQQ writes them (hqq/core/quantize.py, bitpack.py): the codes of all groups are a matrix (groups, group_size), of
which the first part of the rows lies in the highest bits of `W_q`, the next part below; a weight is
``(code - zero) * scale`` with a zero point that needn't be whole. Bits, group size and shape are tensors beside it.
"""

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from quantcore.bitstream import pack
from quantcore.errors import UnsupportedError
from quantcore.formats.affine import FLOATS, Parts, check_finite, from_zero_points, joined, scheme_of
from quantcore.formats.checkpoint import Entry
from quantcore.formats.files import Array, Stored
from quantcore.tensor import QuantizedTensor

__all__ = ["MARKER", "SUFFIXES", "entries"]

MARKER: Final = "W_q"

SUFFIXES: Final = (
    "W_q",
    "axis",
    "channel_wise",
    "compute_dtype",
    "encoded_state_dict",
    "group_size",
    "nbits",
    "offload_meta",
    "optimize",
    "packing",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "scale",
    "shape",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
    "zero",
)

_LANES: Final = {1: (8, "u1"), 2: (4, "u1"), 3: (10, "<u4"), 4: (2, "u1"), 8: (1, "u1")}
"""By bits: how many rows share an element of `W_q`, and that element's type."""


def entries(tensors: Mapping[str, Stored], *, exact: bool) -> dict[str, Entry]:
    """The quantized weights of an HQQ checkpoint.

    Raises
    ------
    FormatError, UnsupportedError
        If a tensor isn't as HQQ writes it, or its groups lie along axis 0.
    """
    return {name: _entry(parts, exact) for name, parts in joined(tensors, MARKER, SUFFIXES).items()}


def _entry(parts: Parts, exact: bool) -> Entry:
    w_q = parts.need(MARKER, rank=2)
    for option in ("quant_scale", "quant_zero"):
        if _number(parts, option, 0):
            raise UnsupportedError(f"{w_q.place}: HQQ with {option}=True isn't read")
    if _number(parts, "axis") != 1:
        raise UnsupportedError(f"{w_q.place}: HQQ groups along axis 0 are strided; read are those along axis 1")
    bits = _number(parts, "nbits")
    if bits not in _LANES:
        w_q.malformed(f"HQQ of {bits} bits")
    shape = _shape(parts)
    out, in_features = shape
    group = _number(parts, "group_size", in_features)
    if group < 1 or in_features % group:
        w_q.malformed(f"groups of {group} don't divide rows of {in_features}")
    rows = out * (in_features // group)
    lanes, element = _LANES[bits]
    stored_rows = -(-rows // lanes)
    if w_q.nbytes != stored_rows * group * np.dtype(element).itemsize:
        w_q.malformed(f"{w_q.nbytes} bytes; a weight of shape {shape}, {bits} bits, groups of {group}, has other")
    scale, zero = parts.need("scale", *FLOATS), parts.need("zero", *FLOATS)
    for part in (scale, zero):
        if math.prod(part.shape) != rows:
            part.malformed(f"shape {part.shape}; expected one for each of {rows} groups")
    scheme = scheme_of(w_q, bits, group, in_features)

    def read() -> QuantizedTensor:
        raw = w_q.array().reshape(-1).view(element).reshape(stored_rows, group)
        codes = _codes(raw, bits, lanes)[:rows].reshape(out, in_features)
        scales, zeros = (part.array().reshape(out, -1) for part in (scale, zero))
        check_finite(scale, scales)
        check_finite(zero, zeros)
        return from_zero_points(w_q, pack(codes, bits), scales, zeros, scheme, in_features, exact=exact)

    return parts.entry("HQQ", shape, scheme, scale.dtype_name, read)


def _codes(raw: Array, bits: int, lanes: int) -> Array:
    """Codes (lanes · rows, group), the highest bits first; of 3-bit words the upper two bits are unused."""
    found = np.empty((lanes, *raw.shape), np.uint8)
    for lane in range(lanes):
        found[lane] = (raw >> raw.dtype.type(bits * (lanes - 1 - lane))) & raw.dtype.type((1 << bits) - 1)
    return found.reshape(-1, raw.shape[1])


def _number(parts: Parts, suffix: str, default: int | None = None) -> int:
    """The integer that HQQ stores as a tensor."""
    stored = parts.get(suffix, needed=default is None)
    if stored is None:
        assert default is not None
        return default
    if stored.dtype.kind not in "iub" or math.prod(stored.shape) != 1:
        stored.malformed(f"expected one integer, not {stored.dtype_name} of shape {stored.shape}")
    return int(stored.array().reshape(-1)[0])


def _shape(parts: Parts) -> tuple[int, int]:
    stored = parts.need("shape", "int32", "int64", rank=1)
    if stored.shape != (2,):
        stored.malformed(f"expected two lengths, not {stored.shape}")
    out, in_features = (int(length) for length in stored.array())
    if min(out, in_features) < 1:
        stored.malformed(f"a weight of shape {(out, in_features)}")
    return out, in_features
