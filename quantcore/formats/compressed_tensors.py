"""compressed-tensors checkpoints of format pack-quantized.

As the library writes them (compressors/pack_quantized): codes are signed integers plus ``2**(bits - 1)``, packed along
the input features; zero points, where there are any, likewise, packed along the output features; a weight is
``(code - zero) * scale``. Older versions put ``32 // bits`` codes into a word and leave its other bits unused, newer
ones pack densely; for 3, 5 and 6 bits the number of words tells which.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from quantcore.bitstream import pack, unpack
from quantcore.errors import UnsupportedError
from quantcore.formats.affine import FLOATS, Parts, check_finite, from_zero_points, joined, scheme_of
from quantcore.formats.checkpoint import Entry
from quantcore.formats.config import Settings
from quantcore.formats.files import Array, Stored
from quantcore.scheme import BITS
from quantcore.tensor import QuantizedTensor

__all__ = ["MARKER", "SUFFIXES", "entries"]

MARKER: Final = "weight_packed"

SUFFIXES: Final = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def entries(tensors: Mapping[str, Stored], settings: Settings, *, exact: bool) -> dict[str, Entry]:
    """The quantized weights of a compressed-tensors checkpoint.

    Raises
    ------
    FormatError, UnsupportedError
        If the config or a tensor isn't as the library writes it, or the format isn't pack-quantized.
    """
    format = settings.text("format")
    if format != "pack-quantized":
        raise UnsupportedError(f"{settings.file}: compressed-tensors of format {format!r}; read is 'pack-quantized'")
    groups = settings.inner("config_groups")
    schemes = {_weights(groups.inner(name)) for name in groups.values}
    if len(schemes) != 1:
        raise UnsupportedError(f"{settings.file}: compressed-tensors with {len(schemes)} kinds of weights; read is one")
    (bits, group_size, per_tensor) = schemes.pop()
    weights = joined(tensors, MARKER, SUFFIXES)
    return {name: _entry(parts, bits, group_size, per_tensor, exact) for name, parts in weights.items()}


def _weights(group: Settings) -> tuple[int, int | None, bool]:
    """Bits, group size, and whether one scale is for the whole weight."""
    if group.text("format", default="pack-quantized") != "pack-quantized":
        raise UnsupportedError(f"{group.file}: {group.place} has another format than pack-quantized")
    weights = group.inner("weights")
    bits, kind = weights.integer("num_bits"), weights.text("type", default="int")
    if kind != "int":
        raise UnsupportedError(f"{weights.file}: {weights.place} are of type {kind!r}; read are integers")
    if bits not in BITS:
        raise UnsupportedError(f"{weights.file}: {weights.place} have {bits} bits; read are {BITS}")
    strategy = weights.text("strategy", default="group")
    if strategy == "group":
        return bits, weights.group_size("group_size"), False
    if strategy not in ("channel", "tensor"):
        raise UnsupportedError(f"{weights.file}: {weights.place} have the strategy {strategy!r}")
    return bits, None, strategy == "tensor"


def _entry(parts: Parts, bits: int, group_size: int | None, per_tensor: bool, exact: bool) -> Entry:
    packed = parts.need(MARKER, "int32", rank=2)
    scale = parts.need("weight_scale", *FLOATS)
    zero = parts.get("weight_zero_point", "int32", "int8", needed=False)
    g_idx = parts.get("weight_g_idx", "int32", "int64", rank=1, needed=False)
    out, in_features = _shape(parts, packed)
    scheme = scheme_of(packed, bits, group_size, in_features)
    groups = scheme.groups(in_features)
    dense = _is_dense(packed, packed.shape[1], in_features, bits)
    if scale.shape != ((1,) if per_tensor else (out, groups)) and not (groups == 1 and scale.shape == (out,)):
        scale.malformed(f"shape {scale.shape}; a weight of shape {(out, in_features)}, {scheme}, has {(out, groups)}")

    def read() -> QuantizedTensor:
        if g_idx is not None:
            _check_order(g_idx, in_features, scheme.group_size or in_features)
        words = packed.array().view("<u4")
        if not dense:
            words = pack(_loose(words, bits, in_features), bits)
        scales = scale.array()
        check_finite(scale, scales)
        scales = np.broadcast_to(scales.reshape(-1, groups), (out, groups))
        zeros = _zeros(zero, bits, out, groups, dense)
        canonical = _without_spare_bits(words, in_features * bits)
        return from_zero_points(packed, canonical, scales, zeros, scheme, in_features, exact=exact)

    return parts.entry("compressed-tensors", (out, in_features), scheme, scale.dtype_name, read)


def _shape(parts: Parts, packed: Stored) -> tuple[int, int]:
    stored = parts.need("weight_shape", "int32", "int64", rank=1)
    shape = tuple(int(length) for length in stored.array()) if stored.shape == (2,) else ()
    if len(shape) != 2 or min(shape) < 1 or shape[0] != packed.shape[0]:
        stored.malformed(f"it says {shape}, {packed.name} has {packed.shape[0]} rows")
    return shape


def _is_dense(stored: Stored, words: int, count: int, bits: int) -> bool:
    """Whether `count` codes are packed densely, going by the number of words."""
    dense, loose = -(-count * bits // 32), -(-count // (32 // bits))
    if words not in (dense, loose):
        stored.malformed(f"{words} words for {count} codes of {bits} bits; there should be {dense}")
    if dense == loose and 32 % bits and count > 32 // bits:
        raise UnsupportedError(
            f"{stored.place}: {count} codes of {bits} bits take "
            f"{words} words in either of the library's packings; they can't be told apart"
        )
    return words == dense


def _loose(words: Array, bits: int, count: int) -> Array:
    """Codes (n, count) from words with ``32 // bits`` codes each."""
    per_word = 32 // bits
    found = np.empty((*words.shape, per_word), np.uint8)
    for lane in range(per_word):
        found[..., lane] = (words >> np.uint32(lane * bits)) & np.uint32((1 << bits) - 1)
    return found.reshape(len(words), -1)[:, :count]


def _zeros(zero: Stored | None, bits: int, out: int, groups: int, dense: bool) -> Array:
    """Zero points (out, groups) in the range of the codes, packed as these are."""
    half = 1 << (bits - 1)
    if zero is None:
        return np.full((out, groups), half, np.uint8)
    if zero.dtype == np.int8:  # as early versions wrote them: signed, and not packed
        if zero.shape != (out, groups):
            zero.malformed(f"shape {zero.shape}; expected {(out, groups)}")
        return zero.array().astype(np.int16) + np.int16(half)
    expected = (-(-out * bits // 32) if dense else -(-out // (32 // bits)), groups)
    if zero.shape != expected:
        zero.malformed(f"shape {zero.shape}; expected {expected}")
    words = np.ascontiguousarray(zero.array().view("<u4").T)
    return np.ascontiguousarray((unpack if dense else _loose)(words, bits, out).T)


def _without_spare_bits(words: Array, bits: int) -> Array:
    """The words with the bits after the row's last code cleared."""
    spare = words.shape[1] * 32 - bits
    words = words.astype(np.uint32, copy=False)
    if not spare:
        return words
    cleared: Array = words.copy()
    cleared[:, -1] &= np.uint32((1 << (32 - spare)) - 1)
    return cleared


def _check_order(g_idx: Stored, in_features: int, group: int) -> None:
    order: Any = g_idx.array()
    if order.shape != (in_features,):
        g_idx.malformed(f"shape {order.shape}; expected {(in_features,)}")
    if not (order == np.arange(in_features) // group).all() and not (order == -1).all():
        raise UnsupportedError(
            f"{g_idx.place}: its groups aren't runs of input features "
            "(actorder); such a weight needs its input permuted, which a QuantizedTensor doesn't carry"
        )
