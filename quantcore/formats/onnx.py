"""ONNX models: the initialisers of the graph, and those of MatMulNBits nodes as quantized weights.

MatMulNBits is ONNX Runtime's operator (`com.microsoft`, docs/ContribOperators.md): B holds the codes, uint8 of shape
(N, blocks, block_size * bits / 8), the lowest bits first; zero points are packed in the same way, or of the scales'
dtype, or ``2**(bits - 1)``; a weight is ``(code - zero) * scale``, and the last block of a row may be padded. A weight
goes by the name of its B. Subgraphs are not entered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, NoReturn

import ml_dtypes
import numpy as np

from quantcore.bitstream import unpack
from quantcore.errors import FormatError, UnsupportedError
from quantcore.formats.affine import FLOATS, check_finite, from_zero_points, scheme_of
from quantcore.formats.checkpoint import Entry, dense
from quantcore.formats.files import ENTRY_BYTES, MAX_RANK, Array, MappedFile, Stored, malformed
from quantcore.formats.protobuf import Field, Message
from quantcore.tensor import QuantizedTensor

__all__ = ["entries", "looks_like"]

# Field numbers of onnx.proto.
_GRAPH: Final = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _EXTERNAL, _LOCATION = 1, 2, 4, 8, 9, 13, 14

# More than MatMulNBits has; nodes of other kinds are passed over.
_MAX_INPUTS: Final = 8
_MAX_ATTRIBUTES: Final = 32

_DTYPES: Final = {
    1: ("FLOAT", np.dtype("<f4")),
    2: ("UINT8", np.dtype("u1")),
    3: ("INT8", np.dtype("i1")),
    4: ("UINT16", np.dtype("<u2")),
    5: ("INT16", np.dtype("<i2")),
    6: ("INT32", np.dtype("<i4")),
    7: ("INT64", np.dtype("<i8")),
    9: ("BOOL", np.dtype(np.bool_)),
    10: ("FLOAT16", np.dtype("<f2")),
    11: ("DOUBLE", np.dtype("<f8")),
    12: ("UINT32", np.dtype("<u4")),
    13: ("UINT64", np.dtype("<u8")),
    16: ("BFLOAT16", np.dtype(ml_dtypes.bfloat16)),
}


@dataclass(slots=True)
class _Node:
    """A MatMulNBits node: where it lies, its inputs and its attributes."""

    offset: int
    inputs: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def input(self, index: int) -> str:
        """The name of an input, empty where it isn't given."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(slots=True)
class _Tensor:
    """The fields of a TensorProto that matter."""

    offset: int
    name: str = ""
    dims: list[int] = field(default_factory=list)
    code: int = 0
    data: Field | None = None
    typed: bool = False
    location: int = 0
    external: dict[str, str] = field(default_factory=dict)


def looks_like(file: MappedFile) -> bool:
    """Whether the file is a protobuf message with a graph where ONNX has it."""
    if file.buffer[0] != 0x08:  # ir_version, which every writer puts first
        return False
    try:
        return any(part.number == _GRAPH and part.kind == 2 for part in Message(file, 0, file.size))
    except FormatError:
        return True  # begins like one; reading it will say what is wrong


def entries(file: MappedFile, *, exact: bool) -> dict[str, Entry]:
    """Every initialiser, those of MatMulNBits nodes as one quantized weight each.

    Raises
    ------
    FormatError, UnsupportedError
        If the file isn't well-formed, or a node's tensors don't fit its attributes.
    """
    model = Message(file, 0, file.size)
    nodes: list[_Node] = []
    tensors: dict[str, Stored | Entry] = {}
    for part in model:
        if part.number != _GRAPH:
            continue
        graph = model.inner(part)
        for item in graph:
            if item.number == _NODE:
                node = _node(graph.inner(item))
                if node is not None:
                    nodes.append(node)
                    file.check_memory(len(nodes), ENTRY_BYTES, "nodes")
            elif item.number == _INITIALIZER:
                name, tensor = _initializer(file, graph.inner(item))
                file.check_memory(len(tensors), ENTRY_BYTES, "initialisers")
                if name in tensors:
                    malformed(file.path, "another initialiser has the same name", tensor=name, offset=item.start)
                tensors[name] = tensor
    weights: dict[str, Entry] = {}
    used: set[str] = set()
    for node in nodes:
        name = node.input(1)
        if name not in tensors:
            continue  # computed by another node
        entry = _weight(file, node, tensors, exact)
        if name in weights and weights[name].scheme is not entry.scheme:
            malformed(file.path, "two nodes read it differently", tensor=name, offset=node.offset)
        weights[name] = entry
        used.update(filter(None, (name, node.input(2), node.input(3))))
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    return {name: dense(t) if isinstance(t, Stored) else t for name, t in plain.items()} | weights


# --- the graph ------------------------------------------------------------------------------------------------


def _node(message: Message) -> _Node | None:
    """The node, if it is a MatMulNBits."""
    found = _Node(message.start)
    op_type = domain = ""
    attributes: list[Field] = []
    for part in message:
        if part.number == _INPUT and len(found.inputs) < _MAX_INPUTS:
            found.inputs.append(message.text(part))
        elif part.number == _OP_TYPE:
            op_type = message.text(part)
        elif part.number == _DOMAIN:
            domain = message.text(part)
        elif part.number == _ATTRIBUTE and len(attributes) < _MAX_ATTRIBUTES:
            attributes.append(part)
    if (op_type, domain) != ("MatMulNBits", "com.microsoft"):
        return None
    for part in attributes:
        attribute = message.inner(part)
        name, number = "", 0
        for value in attribute:
            if value.number == _ATTRIBUTE_NAME:
                name = attribute.text(value)
            elif value.number == _ATTRIBUTE_INT:
                number = attribute.number(value)
        found.numbers[name] = number
    return found


def _initializer(file: MappedFile, message: Message) -> tuple[str, Stored | Entry]:
    found = _Tensor(message.start)
    for part in message:
        if part.number == _NAME:
            found.name = message.text(part)
        elif part.number == _DIMS:
            numbers = message.inner(part).varints() if part.kind == 2 else iter([message.number(part)])
            for number in numbers:
                found.dims.append(number)
                if len(found.dims) > MAX_RANK:
                    malformed(file.path, f"more than {MAX_RANK} axes", offset=message.start)
        elif part.number == _DATA_TYPE:
            found.code = message.number(part)
        elif part.number == _LOCATION:
            found.location = message.number(part)
        elif part.number == _EXTERNAL:
            key, value = _pair(message.inner(part))
            if key in ("location", "offset", "length"):
                found.external[key] = value
        elif part.number == _RAW_DATA or (part.number == _FLOAT_DATA and part.kind == 2):
            found.data = part
        elif part.number in (_FLOAT_DATA, 5, 6, 7, 10, 11):
            found.typed = True
    return found.name, _stored(file, found)


def _pair(message: Message) -> tuple[str, str]:
    texts = {part.number: message.text(part) for part in message if part.number in (1, 2)}
    return texts.get(1, ""), texts.get(2, "")


def _stored(file: MappedFile, found: _Tensor) -> Stored | Entry:
    shape = tuple(found.dims)
    if min(shape, default=0) < 0 or max(shape, default=0) >= 1 << 63:
        malformed(file.path, f"shape {str(shape)[:100]}", tensor=found.name, offset=found.offset)
    kind, dtype = _DTYPES.get(found.code, (f"type {found.code}", None))
    if dtype is None or (found.typed and found.data is None):
        what = f"initialisers of {kind}" if dtype is None else f"initialisers of {kind} outside raw_data"
        return _unread(file, found, shape, kind, f"{what} aren't read")
    needed = math.prod(shape) * dtype.itemsize
    if found.location == 1:
        return _external(file, found, shape, kind, dtype, needed)
    if found.data is None:
        offset, given = found.offset, 0
    else:
        offset, given = found.data.start, found.data.stop - found.data.start
    if given != needed or max(shape, default=0) > file.size:
        what = f"{kind} of shape {str(shape)[:100]} takes {str(needed)[:40]} bytes, {given} are given"
        malformed(file.path, what, tensor=found.name, offset=offset)
    return Stored(file, found.name, dtype, shape, offset, kind)


def _external(
    file: MappedFile, found: _Tensor, shape: tuple[int, ...], kind: str, dtype: np.dtype[Any], needed: int
) -> Stored:
    """A tensor whose data is in a file beside the model."""
    name = found.external.get("location", "")
    if PurePosixPath(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        what = f"its data is in {name[:200]!r}, which isn't a file name in this folder"
        malformed(file.path, what, tensor=found.name, offset=found.offset)
    offset, length = (_decimal(file, found, key) for key in ("offset", "length"))
    path = file.path.parent / name
    if not path.is_file():
        malformed(file.path, f"the file {name!r} with its data is missing", tensor=found.name, offset=found.offset)
    data = MappedFile(path)
    if length not in (None, needed) or max(shape, default=0) > data.size:
        what = f"{kind} of shape {str(shape)[:100]} takes {str(needed)[:40]} bytes, {length} are given"
        malformed(file.path, what, tensor=found.name, offset=found.offset)
    data.check(offset or 0, needed, "its data", found.name)
    return Stored(data, found.name, dtype, shape, offset or 0, kind)


def _decimal(file: MappedFile, found: _Tensor, key: str) -> int | None:
    text = found.external.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        malformed(file.path, f"its {key} is {text[:40]!r}", tensor=found.name, offset=found.offset)
    return int(text)


def _unread(file: MappedFile, found: _Tensor, shape: tuple[int, ...], kind: str, why: str) -> Entry:
    message = f"{file.path}, tensor {found.name!r}, byte {found.offset}: {why}"

    def read() -> Any:
        raise UnsupportedError(message)

    return Entry(shape, kind.lower(), kind, 0, None, read)


# --- the weights ----------------------------------------------------------------------------------------------


def _weight(file: MappedFile, node: _Node, tensors: dict[str, Stored | Entry], exact: bool) -> Entry:
    name = node.input(1)

    def bad(what: str) -> NoReturn:
        malformed(file.path, f"MatMulNBits: {what}", tensor=name, offset=node.offset)

    in_features, out = node.numbers.get("K", 0), node.numbers.get("N", 0)
    bits, block = node.numbers.get("bits", 4), node.numbers.get("block_size", 0)
    if in_features < 1 or out < 1 or bits not in (2, 4, 8) or block < 1:
        bad(f"K = {in_features}, N = {out}, {bits} bits, blocks of {block}")
    if node.input(4):
        raise UnsupportedError(f"{file.path}, tensor {name!r}, byte {node.offset}: MatMulNBits with g_idx isn't read")
    blocks = -(-in_features // block)
    codes = _part(tensors, name, ("uint8",), out * blocks * block * bits // 8, bad)
    scales = _part(tensors, node.input(2), FLOATS, out * blocks, bad)
    scheme = scheme_of(codes, bits, block, in_features)
    zero_bytes = -(-blocks * bits // 8)
    zeros = None
    if node.input(3):
        given = tensors.get(node.input(3))
        packed = isinstance(given, Stored) and given.dtype == np.uint8
        count = out * (zero_bytes if packed else blocks)
        zeros = _part(tensors, node.input(3), ("uint8",) if packed else (scales.dtype_name,), count, bad)

    def read() -> QuantizedTensor:
        packed = _row_words(codes.array().reshape(out, -1), in_features * bits)
        scale = scales.array().reshape(out, blocks)
        check_finite(scales, scale)
        if zeros is None:
            zero: Array = np.full((out, blocks), 1 << (bits - 1), np.uint8)
        elif zeros.dtype == np.uint8:
            zero = unpack(_row_words(zeros.array().reshape(out, -1), 8 * zero_bytes), bits, blocks)
        else:
            zero = zeros.array().reshape(out, blocks)
            check_finite(zeros, zero)
        return from_zero_points(codes, packed, scale, zero, scheme, in_features, exact=exact)

    nbytes = codes.nbytes + scales.nbytes + (zeros.nbytes if zeros else 0)
    return Entry((out, in_features), scales.dtype_name, "MatMulNBits", nbytes, scheme, read)


def _part(
    tensors: dict[str, Stored | Entry], name: str, dtypes: tuple[str, ...], count: int, bad: Callable[[str], NoReturn]
) -> Stored:
    stored = tensors.get(name)
    if not isinstance(stored, Stored):
        bad(f"its input {name!r} is no initialiser that is read")
    if stored.dtype_name not in dtypes or math.prod(stored.shape) != count:
        stored.malformed(f"{stored.dtype_name} of shape {stored.shape}; expected {count} {' or '.join(dtypes)}")
    return stored


def _row_words(rows: Array, bits: int) -> Array:
    """Rows of bytes as rows of words with the bits from `bits` on cleared."""
    count = -(-bits // 32) * 4
    used = -(-bits // 8)
    padded = np.zeros((len(rows), count), np.uint8)
    padded[:, :used] = rows[:, :used]
    if bits % 8:
        padded[:, used - 1] &= np.uint8((1 << bits % 8) - 1)
    return padded.view("<u4").astype(np.uint32, copy=False)
