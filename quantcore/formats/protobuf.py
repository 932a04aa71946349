"""As much of protobuf's wire format as reading a model's graph takes: fields of a message, where they lie in a file.

https://protobuf.dev/programming-guides/encoding. Nothing is copied: a field of bytes is a range of the mapped file.
"""

from collections.abc import Iterator
from typing import Final, NoReturn

from quantcore.formats.files import MappedFile, malformed

__all__ = ["Field", "Message"]

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5

_MAX_TEXT: Final = 1 << 16


class Field:
    """One field: its number, its kind, and either a value or a range."""

    __slots__ = ("kind", "number", "start", "stop", "value")

    def __init__(self, number: int, kind: int, value: int, start: int, stop: int) -> None:
        self.number = number
        self.kind = kind
        self.value = value
        self.start = start
        self.stop = stop


class Message:
    """A message that lies in a file from `start` to `stop`.

    Raises
    ------
    FormatError
        While it is iterated over, if a field isn't well-formed or goes beyond the message.
    """

    __slots__ = ("file", "start", "stop")

    def __init__(self, file: MappedFile, start: int, stop: int) -> None:
        self.file = file
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[Field]:
        at = self.start
        while at < self.stop:
            begin = at
            key, at = self._varint(at)
            number, kind = key >> 3, key & 7
            if number == 0 or number >= 1 << 29:
                self.malformed(f"field number {number}", begin)
            value, start = 0, at
            if kind == _VARINT:
                value, at = self._varint(at)
            elif kind == _BYTES:
                length, start = self._varint(at)
                at = start + length
            elif kind in (_FIXED64, _FIXED32):
                at = start + (8 if kind == _FIXED64 else 4)
            else:
                self.malformed(f"a field of wire type {kind}", begin)
            if at > self.stop:
                self.malformed(f"a field goes on to byte {at}, its message ends at {self.stop}", begin)
            yield Field(number, kind, value, start, at)

    def varints(self) -> Iterator[int]:
        """The numbers of a packed field."""
        at = self.start
        while at < self.stop:
            value, at = self._varint(at)
            yield value

    def inner(self, field: Field) -> "Message":
        """The message in a field of bytes."""
        if field.kind != _BYTES:
            self.malformed(f"field {field.number} has wire type {field.kind}; expected bytes", field.start)
        return Message(self.file, field.start, field.stop)

    def text(self, field: Field) -> str:
        """The string in a field of bytes."""
        inner = self.inner(field)
        if inner.stop - inner.start > _MAX_TEXT:
            self.malformed(f"a name of {inner.stop - inner.start} bytes", field.start)
        try:
            return self.file.buffer[inner.start : inner.stop].decode("utf-8")
        except UnicodeDecodeError:
            self.malformed("a name isn't UTF-8", field.start)

    def number(self, field: Field) -> int:
        """The signed number in a varint field."""
        if field.kind != _VARINT:
            self.malformed(f"field {field.number} has wire type {field.kind}; expected a number", field.start)
        return field.value - (1 << 64) if field.value >= 1 << 63 else field.value

    def malformed(self, what: str, offset: int) -> NoReturn:
        """Raise the FormatError for a place."""
        malformed(self.file.path, f"not well-formed protobuf: {what}", offset=offset)

    def _varint(self, at: int) -> tuple[int, int]:
        """The unsigned number at a position, and where it ends."""
        value, shift, begin = 0, 0, at
        while True:
            if at >= self.stop:
                self.malformed("a number goes beyond its message", begin)
            byte = self.file.buffer[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 63:
                self.malformed("a number of more than 64 bits", begin)
        return value & ((1 << 64) - 1), at
