"""GPTQ checkpoints, versions 1 and 2: codes packed along the input features.

As AutoGPTQ and GPTQModel write them (qlinear `pack` and `dequantize_weight`): column n of `qweight` is one bitstream
of the codes of output feature n, also where 3-bit codes cross words; `qzeros` packs the zero points along the output
features in the same way; a weight is ``(code - zero) * scale``. Version 1 stores ``zero - 1``; which version it is says
`checkpoint_format`, ``"gptq"`` or ``"gptq_v2"``, and checkpoints older than that key are of version 1.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from quantcore.bitstream import unpack
from quantcore.errors import UnsupportedError
from quantcore.formats.affine import FLOATS, Parts, check_finite, from_zero_points, joined, scheme_of
from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings
from quantcore.formats.files import Array, Stored, malformed
from quantcore.memory import aligned_empty
from quantcore.tensor import QuantizedTensor

__all__ = ["SUFFIXES", "entries"]

SUFFIXES: Final = ("qweight", "qzeros", "scales", "g_idx")

_BITS: Final = (2, 3, 4, 8)


def entries(tensors: Mapping[str, Stored], settings: Settings, *, exact: bool) -> dict[str, Entry]:
    """The quantized weights of a GPTQ checkpoint.

    Raises
    ------
    FormatError, UnsupportedError
        If the config or a tensor isn't as it must be, or the packing is another one.
    """
    packing = settings.text("checkpoint_format", default="gptq")
    if packing not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"{settings.file}: GPTQ with checkpoint_format {packing!r}; read are 'gptq', 'gptq_v2'")
    bits = settings.integer("bits")
    group = settings.group_size("group_size")
    own = bool(settings.values.get("dynamic"))  # modules with bits and groups of their own, which their shapes tell
    return {
        name: _entry(parts, None if own else (bits, group), packing == "gptq", exact)
        for name, parts in joined(tensors, "qweight", SUFFIXES).items()
    }


def _entry(parts: Parts, told: tuple[int, int | None] | None, first_version: bool, exact: bool) -> Entry:
    qweight = parts.need("qweight", "int32", rank=2)
    scales = parts.need("scales", *FLOATS, rank=2)
    qzeros = parts.need("qzeros", "int32", rank=2)
    g_idx = parts.get("g_idx", "int32", "int64", rank=1, needed=False)
    out = qweight.shape[1]
    groups = scales.shape[0]
    if 0 in qweight.shape or groups == 0:
        qweight.malformed(f"shape {qweight.shape} with {groups} groups is empty")
    # Of the shapes, that of qzeros alone tells the bits: (groups, out * bits / 32).
    bits, rest = divmod(qzeros.shape[1] * 32, out)
    if rest or bits not in _BITS:
        qzeros.malformed(f"shape {qzeros.shape} isn't that of {out} zero points of 2, 3, 4 or 8 bits")
    in_features, rest = divmod(qweight.shape[0] * 32, bits)
    if rest or in_features % groups:
        qweight.malformed(f"shape {qweight.shape} isn't that of {bits}-bit codes in {groups} groups")
    group = in_features // groups
    if told is not None and (bits, group) != (told[0], told[1] or in_features):
        qweight.malformed(
            f"its shapes are of {bits} bits in groups of {group}, the config says {told[0]} and {told[1]}"
        )
    if scales.shape != (groups, out) or qzeros.shape[0] != groups:
        scales.malformed(f"shape {scales.shape}, zero points {qzeros.shape}; expected {groups} groups of {out}")
    if g_idx is not None and g_idx.shape != (in_features,):
        g_idx.malformed(f"shape {g_idx.shape}; expected {(in_features,)}")
    scheme = scheme_of(qweight, bits, group, in_features)

    def read() -> QuantizedTensor:
        if g_idx is not None:
            _check_order(g_idx, group)
        packed = aligned_empty(qweight.shape[::-1], np.uint32)
        packed[...] = qweight.array().view("<u4").T
        zeros = unpack(qzeros.array().view("<u4"), bits, out)
        if first_version:
            zeros = _from_first_version(qzeros, zeros, bits)
        scale = scales.array()
        check_finite(scales, scale)
        scale, zeros = np.ascontiguousarray(scale.T), np.ascontiguousarray(zeros.T)
        return from_zero_points(qweight, packed, scale, zeros, scheme, in_features, exact=exact)

    return parts.entry("GPTQ", (out, in_features), scheme, scales.dtype_name, read)


def _check_order(g_idx: Stored, group: int) -> None:
    order = g_idx.array()
    expected = np.arange(len(order)) // group
    if not (order == expected).all():
        raise UnsupportedError(
            f"{g_idx.place}: its groups aren't runs of input features "
            "(desc_act=True); such a weight needs its input permuted, which a QuantizedTensor doesn't carry"
        )


def _from_first_version(qzeros: Stored, stored: Array, bits: int) -> Array:
    """Zero points from those of version 1, one less each."""
    top = (1 << bits) - 1
    if int(stored.max()) == top:
        row, column = np.argwhere(stored == top)[0]
        offset = qzeros.offset + 4 * (int(row) * qzeros.shape[1] + int(column) * bits // 32)
        malformed(
            qzeros.file.path,
            f"zero point ({row}, {column}) is stored as {top}, which in GPTQ version 1 means 0 to some writers and "
            f"{top + 1} to others; save the checkpoint as gptq_v2",
            tensor=qzeros.name,
            offset=offset,
        )
    return stored + np.uint8(1)
