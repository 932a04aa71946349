"""Integer vectors for Numba: codes times activations of 16 or 8 bits, summed in int32 lanes.

A *chunk* is what one vector of packed words holds. Lane i of a sum covers the codes of the chunk's word i, so that
groups lie in runs of lanes; within a word, *plane* j takes the j-th code of each half, or of each byte. So a shift and
a mask unpack a whole vector, and the activations are put in that order once, by :mod:`activations`. Codes of 3, 5 and 6
bits cross words: of these a chunk has two or four a lane, put in place by a shuffle.

Only the dot of bytes needs to know the target; LLVM finds the host's instructions for all else.
"""

import platform
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import Tuple
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.layout import FLOAT_WIDTH
from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    BYTES,
    DWORD,
    DWORDS,
    FLOAT,
    FLOATS,
    LANES,
    QWORD,
    SHORT,
    SHORTS,
    called,
    constant,
    floats,
    half_as_float,
    ints,
    offset,
    pointer_to,
    read,
    repeat,
    shuffled,
    target_has,
    undefined,
)

__all__ = [
    "Form",
    "add_products",
    "byte_dot",
    "byte_pairs",
    "chunk_codes",
    "chunk_sums",
    "codes_of_words",
    "crossing",
    "dot",
    "first_floats",
    "form",
    "lane_codes",
    "spread",
    "spread_first",
    "takes_bytes",
    "to_floats",
]


class Form(NamedTuple):
    """How activations lie: as floats, as 16-bit integers, or as one to three layers of bytes, the upper ones first.

    `parts` is how many a word holds.
    """

    layers: int
    parts: int


def byte_dot(bits: int) -> str | None:
    """The target's dot of codes, as unsigned bytes, with signed ones: ``"vnni"``, ``"maddubs"``, ``"sdot"`` or none."""
    if LANES == 16:
        return "vnni" if target_has("avx512vnni") else None
    if target_has("avxvnni") or (target_has("avx512vnni") and target_has("avx512vl")):
        return "vnni"
    if bits == 8:
        return None  # sums of pairs would saturate, or the codes be taken for signed
    if target_has("avx2"):
        return "maddubs"
    return "sdot" if target_has("dotprod") and platform.machine().lower() in ("arm64", "aarch64") else None


def takes_bytes(bits: int) -> bool:
    """Whether activations may be layers of bytes: the target has a dot of them, and codes of such bits become bytes."""
    return byte_dot(bits) is not None and lane_codes(bits) >= 4


def form(bits: int, width: int) -> Form:
    """How activations of `width` bits lie beside codes of `bits` bits.

    Those of 16 bits are two layers of bytes where one dot of bytes does four products a lane. ``vpmaddwd`` is as fast
    as two ``vpmaddubsw`` and their additions, and ``vpdpwssd`` would be as two ``vpdpbusd``, but LLVM takes chains of
    it apart.
    """
    if width == FLOAT_WIDTH:
        return Form(1, 1)
    if not takes_bytes(bits):
        if width != 16:
            raise ValueError(f"no dot of bytes for {bits} bits on this target")
        return Form(1, 2)
    if width != 16:
        return Form(width // 8, 4)
    return Form(1, 2) if byte_dot(bits) == "maddubs" else Form(2, 4)


def lane_codes(bits: int) -> int:
    """Codes that a lane of a chunk's sum covers."""
    if 32 % bits == 0:
        return 32 // bits
    return 4 if _BYTES_FROM_ANYWHERE else 2


def chunk_codes(bits: int) -> int:
    """Codes of a chunk."""
    return LANES * lane_codes(bits)


_BYTES_FROM_ANYWHERE: Final = LANES == 16 and target_has("avx512vbmi") and target_has("avx512vnni")


@intrinsic(prefer_literal=True)
def dot(typing: Any, packed: Any, x: Any, bits: Any, width: Any, chunks: Any) -> Any:
    """Sums of codes times activations over some chunks; from `bits` on, compile-time constants.

    The activations of a chunk lie layer by layer, plane by plane. For 3, 5 and 6 bits, up to 40 bytes past the codes
    are read.
    """
    code, activation, count = bits.literal_value, width.literal_value, chunks.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return chunk_sums(builder, args[0], args[1], code, activation, count)

    return ints(types.intp, types.intp, bits, width, chunks), generate


def chunk_sums(builder: Any, packed: Any, x: Any, bits: int, width: int, chunks: int) -> Any:
    """Code of :func:`dot`."""
    layers, parts = form(bits, width)
    step = chunk_codes(bits)
    planes = []
    for chunk in range(chunks):
        address = offset(builder, packed, chunk * step * bits // 8)
        if 32 % bits:
            planes.append([crossing(builder, address, bits)])
        else:
            words = read(builder, address, DWORDS)
            planes.append([codes_of_words(builder, words, bits, plane, parts) for plane in range(32 // bits // parts)])
    total = constant([0] * LANES)
    for layer in range(layers):
        if layer:
            total = builder.shl(total, constant([8] * LANES))
        pairs = []
        for chunk, vectors in enumerate(planes):
            for plane, codes in enumerate(vectors):
                place = (layer * len(vectors) + plane) * LANES * 4
                at = offset(builder, x, chunk * step * width // 8 + place)
                pairs.append((codes, read(builder, at, codes.type)))
        total = add_products(builder, total, pairs, bits)
    return total


def byte_pairs(bits: int) -> int:
    """How many sums of two products of codes with bytes are added in 16 bits: none if the target's dot sums four."""
    return max(1, 32767 // (2 * 128 * ((1 << bits) - 1))) if byte_dot(bits) == "maddubs" else 0


def codes_of_words(builder: Any, words: Any, bits: int, plane: int, parts: int) -> Any:
    """The plane-th code of packed words, or of each half or quarter of them, as int32, 16-bit integers or bytes."""
    if parts == 1:
        if plane:
            words = builder.lshr(words, constant([plane * bits] * LANES))
        if (plane + 1) * bits < 32:
            words = builder.and_(words, constant([(1 << bits) - 1] * LANES))
        return words
    if parts == 4:
        if plane:
            words = builder.lshr(words, constant([plane * bits] * LANES))
        if bits < 8:
            words = builder.and_(words, constant([((1 << bits) - 1) * 0x01010101] * LANES))
        return builder.bitcast(words, BYTES)
    words = builder.bitcast(words, SHORTS)
    if plane:
        words = builder.lshr(words, constant([plane * bits] * 2 * LANES, SHORT))
    if (plane + 1) * bits < 16:
        words = builder.and_(words, constant([(1 << bits) - 1] * 2 * LANES, SHORT))
    return words


def crossing(builder: Any, address: Any, bits: int) -> Any:
    """A chunk of codes that cross words, as bytes or, two a lane, as 16-bit integers."""
    return _crossing_bytes(builder, address, bits) if _BYTES_FROM_ANYWHERE else _crossing_shorts(builder, address, bits)


def _crossing_bytes(builder: Any, address: Any, bits: int) -> Any:
    """Eight codes' bytes moved into each eight bytes, then eight bits taken from any bit of these."""
    raw = read(builder, address, BYTES)
    places = constant([code // 8 * bits + min(code % 8, bits - 1) for code in range(64)], BYTE)
    moved = called(builder, "llvm.x86.avx512.permvar.qi.512", BYTES, [raw, places])
    starts = constant([bits * (code % 8) for code in range(64)], BYTE)
    taken = called(builder, "llvm.x86.avx512.pmultishift.qb.512", BYTES, [starts, moved])
    return builder.and_(taken, constant([(1 << bits) - 1] * 64, BYTE))


def _crossing_shorts(builder: Any, address: Any, bits: int) -> Any:
    """Each code's two bytes moved into its lane, then two shifts.

    Eight codes are `bits` bytes: eight bytes are read into each 16, since shuffles of bytes stay within these.
    """
    blocks = undefined(ir.VectorType(QWORD, LANES // 2))
    for block in range(LANES // 4):
        eight = read(builder, offset(builder, address, block * bits), QWORD)
        blocks = builder.insert_element(blocks, eight, ir.Constant(DWORD, 2 * block))
    first = [code // 8 * 16 + code % 8 * bits // 8 for code in range(2 * LANES)]
    places = [byte for at in first for byte in (at, at + 1)]
    moved = builder.bitcast(shuffled(builder, builder.bitcast(blocks, BYTES), places), SHORTS)
    raised = builder.shl(moved, constant([16 - bits - code % 8 * bits % 8 for code in range(2 * LANES)], SHORT))
    return builder.lshr(raised, constant([16 - bits] * 2 * LANES, SHORT))


def add_products(builder: Any, total: Any, pairs: Sequence[tuple[Any, Any]], bits: int) -> Any:
    """Add to int32 lanes the products of codes with activations, those of a lane together."""
    if pairs[0][0].type == SHORTS:
        for codes, x in pairs:
            total = builder.add(total, _short_products(builder, codes, x))
        return total
    kind = byte_dot(bits)
    if kind == "maddubs":
        return _maddubs(builder, total, pairs, bits)
    for codes, x in pairs:
        if kind == "vnni":
            arguments = [total, builder.bitcast(codes, DWORDS), builder.bitcast(x, DWORDS)]
            total = called(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", DWORDS, arguments)
        else:
            total = _sdot(builder, total, codes, x)
    return total


def _short_products(builder: Any, codes: Any, x: Any) -> Any:
    """Products of 16-bit vectors, those of neighbours added."""
    wide = ir.VectorType(DWORD, 2 * LANES)
    products = builder.mul(builder.sext(codes, wide), builder.sext(x, wide))
    even = shuffled(builder, products, list(range(0, 2 * LANES, 2)))
    return builder.add(even, shuffled(builder, products, list(range(1, 2 * LANES, 2))))


def _maddubs(builder: Any, total: Any, pairs: Sequence[tuple[Any, Any]], bits: int) -> Any:
    """Sums of pairs in 16 bits, as many as can't overflow, before they are widened."""
    together = byte_pairs(bits)
    for start in range(0, len(pairs), together):
        sums = [called(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, pair) for pair in pairs[start : start + together]]
        whole = sums[0]
        for more in sums[1:]:
            whole = builder.add(whole, more)
        total = builder.add(total, _short_products(builder, whole, constant([1] * 2 * LANES, SHORT)))
    return total


def _sdot(builder: Any, total: Any, codes: Any, x: Any) -> Any:
    """Arm's signed dot, 16 bytes at a time."""
    quad = ir.VectorType(DWORD, 4)
    parts = []
    for part in range(LANES // 4):
        lanes, places = list(range(4 * part, 4 * part + 4)), list(range(16 * part, 16 * part + 16))
        arguments = [shuffled(builder, total, lanes), shuffled(builder, codes, places), shuffled(builder, x, places)]
        parts.append(called(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", quad, arguments))
    return builder.shuffle_vector(parts[0], parts[1], constant(list(range(8))))


@intrinsic
def to_floats(typing: Any, vector: Any) -> Any:
    """int32 lanes as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], FLOATS)

    return floats(ints), generate


@intrinsic(prefer_literal=True)
def spread(typing: Any, address: Any, count: Any) -> Any:
    """`count` float32 from memory over the lanes, each in a run of them."""
    number = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if number == 1:
            return repeat(builder, read(builder, args[0], FLOAT), LANES)
        several = read(builder, args[0], ir.VectorType(FLOAT, number))
        return shuffled(builder, several, [lane * number // LANES for lane in range(LANES)])

    return floats(types.intp, count), generate


@intrinsic(prefer_literal=True)
def spread_first(typing: Any, addresses: Any, kind: Any, count: Any, first: Any) -> Any:
    """As :func:`spread`, from each of some addresses, of any kind of :func:`simd.scale_at`.

    Only the first few are read; 0 stands for the others. `kind` may be known only when the kernel runs.
    """
    number = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = [lane * number // LANES for lane in range(LANES)]
        found = first_floats(builder, cgutils.unpack_tuple(builder, args[0]), args[3], args[1], number)
        return context.make_tuple(builder, signature.return_type, [shuffled(builder, each, places) for each in found])

    return Tuple([floats] * len(addresses))(addresses, types.intp, count, types.intp), generate


def first_floats(builder: Any, addresses: list[Any], left: Any, kind: Any, count: int) -> list[Any]:
    """`count` floats from each address, of which the first `left` are read; 0 stands for the others.

    `kind` is a value of the code, since a branch costs next to nothing here: else each kind would have kernels of its
    own, which take seconds to compile.
    """
    wanted = repeat(builder, builder.trunc(left, DWORD), count)
    there = builder.icmp_signed("<", constant(list(range(count))), wanted)
    kinds = [builder.append_basic_block(name) for name in ("float32", "float16", "bfloat16")]
    done = builder.append_basic_block("widened")
    switch = builder.switch(kind, kinds[0])
    for number, block in enumerate(kinds):
        if number:
            switch.add_case(ir.Constant(kind.type, number), block)
    widened = []
    for number, block in enumerate(kinds):
        builder.position_at_end(block)
        widened.append([_widened(builder, _loaded(builder, each, there, number), number) for each in addresses])
        builder.branch(done)
    builder.position_at_end(done)
    found = []
    for of_kinds in zip(*widened, strict=True):
        merged = builder.phi(of_kinds[0].type)
        for value, block in zip(of_kinds, kinds, strict=True):
            merged.add_incoming(value, block)
        found.append(merged)
    return found


def _loaded(builder: Any, address: Any, there: Any, kind: int) -> Any:
    """Floats of a kind as they are stored, where they are there; else 0."""
    several = ir.VectorType((FLOAT, SHORT, SHORT)[kind], there.type.count)
    name = f"llvm.masked.load.v{several.count}{('f32', 'i16', 'i16')[kind]}.p0"
    arguments = [pointer_to(builder, address, several), ir.Constant(DWORD, 1), there, ir.Constant(several, None)]
    return called(builder, name, several, arguments)


def _widened(builder: Any, stored: Any, kind: int) -> Any:
    """Stored floats as float32."""
    if kind == 0:
        return stored
    if kind == 1:
        return half_as_float(builder, stored)
    count = stored.type.count
    raised = builder.shl(builder.zext(stored, ir.VectorType(DWORD, count)), constant([16] * count))
    return builder.bitcast(raised, ir.VectorType(FLOAT, count))
