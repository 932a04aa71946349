"""GGUF's tensor types: blocks of codes and scales, and the codes, scales and biases that equal them.

The blocks are laid out as in ggml-common.h; the order of the codes in each is that of gguf-py's dequantizers
(gguf/quants.py), to which the tests hold these readers. MXFP4 and NVFP4 are the modes of these names, codes and scales
as they are; all others are affine in float32 exactly: the scale of a K-quant's
group is the product of a float16 and an integer of at most 8 bits, and what gguf-py computes of them is a product and a
sum that float32 either holds or rounds once, here as there. (Only the sign of a zero may differ: of `(q - 8) * d` with
a negative d, which is -0.0 there.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from quantcore.bitstream import pack
from quantcore.errors import UnsupportedError
from quantcore.formats.affine import all_finite
from quantcore.formats.checkpoint import Entry, dense
from quantcore.formats.files import Array, MappedFile, Stored, malformed
from quantcore.formats.microscaled import is_nan
from quantcore.memory import aligned_empty
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["TYPES", "BlockType", "entry"]

_TILE: Final = 1 << 19  # what a core's own cache holds
"""Elements whose codes are unpacked at one time."""

_F16: Final = np.dtype("<f2")

Parts = tuple[Array, ...]
"""Of n blocks: codes (n, block) as uint8 or packed words (n, words) as uint32; scales, biases if any: (n, groups)."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A tensor type of ggml.

    Parameters
    ----------
    name : str
    block : int
        Elements of a block; 1 for a dense type.
    nbytes : int
        Bytes of a block.
    dtype : numpy.dtype or None
        Of a dense type.
    scheme : Scheme or None
        Of a type that is read.
    split : callable or None
        From blocks, uint8 of shape (n, nbytes), to `Parts`.
    """

    name: str
    block: int
    nbytes: int
    dtype: np.dtype[Any] | None = None
    scheme: Scheme | None = None
    split: Callable[[Array], Parts] | None = None


def entry(file: MappedFile, name: str, shape: tuple[int, ...], kind: BlockType, offset: int, nbytes: int) -> Entry:
    """The entry of a tensor whose range has been checked."""
    if kind.dtype is not None:
        return dense(Stored(file, name, kind.dtype, shape, offset, kind.name))

    def read() -> Any:
        if kind.scheme is None:
            raise UnsupportedError(
                f"{file.path}, tensor {name!r}, byte {offset}: {kind.name} isn't read: no scheme here is like it. "
                "The other tensors can be read; to use this one, requantize the file, to Q4_K say"
            )
        if len(shape) > 1:
            return _read(file, name, shape, kind, offset)
        return _read(file, name, (1, *shape), kind, offset).dequantize()[0]

    scheme = kind.scheme if len(shape) > 1 else None  # a vector is given dense: quantized ones have two axes or more
    return Entry(shape, "float32", kind.name, nbytes, scheme, read)


def _read(file: MappedFile, name: str, shape: tuple[int, ...], kind: BlockType, offset: int) -> QuantizedTensor:
    scheme, split = kind.scheme, kind.split
    assert scheme is not None
    assert split is not None
    if math.prod(shape) == 0:
        malformed(file.path, f"an empty tensor of shape {shape} can't be {kind.name}", tensor=name, offset=offset)
    in_features = shape[-1]
    per_row = in_features // kind.block
    rows = math.prod(shape[:-1])
    blocks = file.array(np.dtype(np.uint8), (rows, per_row, kind.nbytes), offset, name)
    packed = aligned_empty((rows, scheme.words(in_features)), np.uint32)
    of_groups: list[Array] = []
    step = max(1, _TILE // in_features)
    for start in range(0, rows, step):
        part = blocks[start : start + step]
        codes, *found = split(part.reshape(-1, kind.nbytes))
        if start == 0:
            of_groups = [aligned_empty((rows, scheme.groups(in_features)), leaf.dtype) for leaf in found]
        rowwise = codes.reshape(len(part), -1)
        packed[start : start + step] = rowwise if codes.dtype == np.uint32 else pack(rowwise, scheme.bits)
        for whole, some in zip(of_groups, found, strict=True):
            whole[start : start + step] = some.reshape(len(part), -1)
        block = _first_bad(found, scheme)
        if block is not None:
            at = offset + (start * per_row + block) * kind.nbytes
            malformed(file.path, "a scale isn't finite", tensor=name, offset=at)
        file.release(offset + start * per_row * kind.nbytes, part.nbytes)
    if scheme.bits in (4, 5, 8) and kind.name.endswith("_0"):
        of_groups[1] = _narrow(of_groups[1])
    packed, scales, *biases = (leaf.reshape(*shape[:-1], -1) for leaf in (packed, *of_groups))
    return QuantizedTensor(packed, scales, biases[0] if biases else None, scheme, in_features, dtype="float32")


def _first_bad(found: list[Array], scheme: Scheme) -> int | None:
    """The first block with a scale or bias that is NaN or infinite."""
    if not scheme.has_biases:
        bad = is_nan(found[0], scheme.mode)
    elif all(map(all_finite, found)):
        return None
    else:
        bad = ~np.logical_and(*map(np.isfinite, found))
    return int(bad.any(axis=-1).argmax()) if bad.any() else None


def _narrow(biases: Array) -> Array:
    """Biases in float16 where it holds them all: -8d overflows from d = 8192 on, -128d from 512."""
    limit = np.float32(65504)
    return biases.astype(np.float16) if np.abs(biases).max(initial=0) <= limit else biases


# --- blocks of 32 ---------------------------------------------------------------------------------------------


def _half(blocks: Array, start: int) -> Array:
    """The float16 at a position of each block, shape (n, 1)."""
    return _field(blocks, start, _F16)[:, None].astype(np.float16, copy=False)


def _nibble_words(qs: Array, run: int) -> Array:
    """Words of 4-bit codes from bytes whose low nibbles are the first `run` codes, the high ones the next `run`.

    Parameters
    ----------
    qs : array, shape (n, m), uint8
        m a multiple of `run`.
    run : int
        A multiple of 8.

    Returns
    -------
    array, shape (n, m // 4), uint32
    """
    eight = np.ascontiguousarray(qs).view("<u8").reshape(len(qs), -1, run // 8)
    words = np.empty((len(qs), eight.shape[1], 2, run // 8), np.uint32)
    for half in range(2):
        x = (eight >> np.uint64(4 * half)) & np.uint64(0x0F0F0F0F0F0F0F0F)
        # Four times, move every second group of bits next to the one before it.
        x |= x >> np.uint64(4)
        x &= np.uint64(0x00FF00FF00FF00FF)
        x |= x >> np.uint64(8)
        x &= np.uint64(0x0000FFFF0000FFFF)
        x |= x >> np.uint64(16)
        words[:, :, half] = x.astype(np.uint32)  # the low word
    return words.reshape(len(qs), -1)


def _block_words(blocks: Array, start: int) -> Array:
    """Words of the 32 4-bit codes in the 16 bytes at `start` of each block, the low nibbles first; shape (n, 4).

    The whole blocks are computed with, so that each step runs over memory without a stride.
    """
    pairs = np.ascontiguousarray(blocks).view("<u2")
    words = np.empty((len(blocks), 2), "<u8")
    for half in range(2):
        x = (pairs >> np.uint16(4 * half)) & np.uint16(0x0F0F)
        x |= x >> np.uint16(4)
        words[:, half] = _field(x.astype(np.uint8), start // 2, np.dtype("<u8"))
    return words.view("<u4").astype(np.uint32, copy=False)


def _field(blocks: Array, start: int, dtype: np.dtype[Any]) -> Array:
    """What lies at `start` of each block, shape (n,), contiguous."""
    record = np.dtype({"names": ["field"], "formats": [dtype], "offsets": [start], "itemsize": blocks.shape[1]})
    return np.ascontiguousarray(blocks.view(record)["field"][:, 0])


def _nibbles(qs: Array, run: int) -> Array:
    """Codes, uint8, in the order of `_nibble_words`."""
    runs = qs.reshape(len(qs), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return (runs & np.uint8(15)).reshape(len(qs), -1)


def _bit_planes(planes: Array, bits: int, run: int) -> Array:
    """Codes of `bits` bits from bytes whose lowest bits are the first `run` codes, the next bits the next `run`, ..."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = planes.reshape(len(planes), -1, 1, run) >> shifts
    return (runs & np.uint8((1 << bits) - 1)).reshape(len(planes), -1)


def _fifth_bits(blocks: Array, start: int) -> Array:
    """Bit 4 of each of 32 codes, from a little-endian uint32."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Array) -> Parts:
    d = _half(blocks, 0)
    return _block_words(blocks, 2), d, d.astype(np.float32) * np.float32(-8)


def _q4_1(blocks: Array) -> Parts:
    return _block_words(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Array) -> Parts:
    d = _half(blocks, 0)
    return _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2), d, d.astype(np.float32) * np.float32(-16)


def _q5_1(blocks: Array) -> Parts:
    return _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Array) -> Parts:
    d = _half(blocks, 0)
    signed = _field(blocks ^ np.uint8(0x80), 2, np.dtype((np.void, 32)))
    return signed.view("<u4").reshape(-1, 8).astype(np.uint32, copy=False), d, d.astype(np.float32) * np.float32(-128)


def _mxfp4(blocks: Array) -> Parts:
    return _nibble_words(blocks[:, 1:], 16), blocks[:, :1]


def _nvfp4(blocks: Array) -> Parts:
    scales = blocks[:, :4]
    scales = np.where(scales == 0x7F, np.uint8(0), scales)  # ggml takes NaN for 0
    return _nibble_words(blocks[:, 4:], 8), np.where(scales > 0x7F, np.uint8(0xFF), scales)  # and knows no sign


# --- blocks of 256 --------------------------------------------------------------------------------------------


def _scales_and_mins(packed: Array) -> tuple[Array, Array]:
    """The eight scales and minima of 6 bits in the 12 bytes of a Q4_K or Q5_K block."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Scales and biases of a Q4_K or Q5_K block, in float32, which holds the products."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    return _half(blocks, 0).astype(np.float32) * scales, _half(blocks, 2).astype(np.float32) * -mins


def _q4_k(blocks: Array) -> Parts:
    return _nibble_words(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Array) -> Parts:
    high = _bit_planes(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _nibbles(blocks[:, 48:], 32) | high, *_k_scales(blocks)


def _q2_k(blocks: Array) -> Parts:
    both = blocks[:, :16]
    d, dmin = _half(blocks, 80).astype(np.float32), _half(blocks, 82).astype(np.float32)
    scales, mins = (both & 15).astype(np.float32), (both >> 4).astype(np.float32)
    return _bit_planes(blocks[:, 16:80], 2, 32), d * scales, dmin * -mins


def _q3_k(blocks: Array) -> Parts:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=1) | (_bit_planes(high, 2, 4) << np.uint8(4))
    scale = _half(blocks, 108).astype(np.float32) * (scales.astype(np.float32) - np.float32(32))
    codes = _bit_planes(blocks[:, 32:96], 2, 32) | (_bit_planes(blocks[:, :32], 1, 32) << np.uint8(2))
    return codes, scale, scale * np.float32(-4)


def _q6_k(blocks: Array) -> Parts:
    scale = _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    codes = _nibbles(blocks[:, :128], 64) | (_bit_planes(blocks[:, 128:192], 2, 32) << np.uint8(4))
    return codes, scale, scale * np.float32(-32)


def _tq2_0(blocks: Array) -> Parts:
    d = _half(blocks, 64)
    return _bit_planes(blocks[:, :64], 2, 32), d, -d


def _affine(name: str, bits: int, block: int, group: int, nbytes: int, split: Callable[[Array], Parts]) -> BlockType:
    return BlockType(name, block, nbytes, scheme=Scheme(bits=bits, group_size=group), split=split)


def _dense(name: str, dtype: Any) -> BlockType:
    return BlockType(name, 1, np.dtype(dtype).itemsize, dtype=np.dtype(dtype))


TYPES: Final[dict[int, BlockType]] = {
    0: _dense("F32", "<f4"),
    1: _dense("F16", "<f2"),
    2: _affine("Q4_0", 4, 32, 32, 18, _q4_0),
    3: _affine("Q4_1", 4, 32, 32, 20, _q4_1),
    6: _affine("Q5_0", 5, 32, 32, 22, _q5_0),
    7: _affine("Q5_1", 5, 32, 32, 24, _q5_1),
    8: _affine("Q8_0", 8, 32, 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 40),
    10: _affine("Q2_K", 2, 256, 16, 84, _q2_k),
    11: _affine("Q3_K", 3, 256, 16, 110, _q3_k),
    12: _affine("Q4_K", 4, 256, 32, 144, _q4_k),
    13: _affine("Q5_K", 5, 256, 32, 176, _q5_k),
    14: _affine("Q6_K", 6, 256, 16, 210, _q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: _dense("I8", "i1"),
    25: _dense("I16", "<i2"),
    26: _dense("I32", "<i4"),
    27: _dense("I64", "<i8"),
    28: _dense("F64", "<f8"),
    29: BlockType("IQ1_M", 256, 56),
    30: _dense("BF16", ml_dtypes.bfloat16),
    34: BlockType("TQ1_0", 256, 54),
    35: _affine("TQ2_0", 2, 256, 256, 66, _tq2_0),
    39: BlockType("MXFP4", 32, 17, scheme=Scheme("mxfp4"), split=_mxfp4),
    40: BlockType("NVFP4", 64, 36, scheme=Scheme("nvfp4"), split=_nvfp4),
    41: BlockType("Q1_0", 128, 18),
}
"""The types by ggml's number; sizes as in ggml.c. Those without dtype and scheme are known and not read."""
