"""Headers that lie: each is refused, with the file, the tensor and the byte where they are known."""

from __future__ import annotations

import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest
from safetensors.numpy import save

import quantcore as qc
from quantcore.formats import files

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
HUGE = (1 << 64) - 1


def read_all(path: Path) -> None:
    """Load a checkpoint and read its tensors."""
    checkpoint = qc.load(path)
    for name in checkpoint:
        checkpoint[name]


def load(path: Path) -> str:
    """The message of the FormatError that loading or reading raises, which names the path."""
    with pytest.raises(qc.FormatError) as caught:
        read_all(path)
    message = str(caught.value)
    assert str(path if path.is_file() else path.parent) in message
    return message


# --- safetensors ----------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return U64.pack(len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (16,), offsets: Any = (0, 64)) -> dict[str, Any]:
    shape, offsets = (list(value) if isinstance(value, tuple) else value for value in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "header longer than the file": (safetensors({}, length=HUGE), "byte 8: the header lies outside the file"),
    "empty header": (U64.pack(0) + b"{}", "byte 8: not JSON"),
    "not JSON": (safetensors(b"{nothing"), "byte 9: not JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "byte 10: the JSON isn't UTF-8"),
    "deep nesting": (safetensors(b'{"a":' * 100_000), "nests too deeply"),
    "a number of many digits": (safetensors(b'{"a":' + b"9" * 5000 + b"}"), "byte 8: bad JSON"),
    "NaN": (safetensors(b'{"a": NaN}'), "byte 8: bad JSON: NaN"),
    "a name twice": (safetensors(b'{"a": 1, "a": 1}'), "the key 'a' occurs twice"),
    "entry is a number": (safetensors({"a": 1}), "tensor 'a', byte 8: its entry must have"),
    "entry lacks the shape": (safetensors({"a": {"dtype": "F32", "data_offsets": [0, 64]}}), "must have dtype, shape"),
    "unknown dtype": (safetensors({"a": entry("F3")}), "tensor 'a', byte 8: unknown dtype 'F3'"),
    "dtype is a list": (safetensors({"a": entry(["F32"])}), "unknown dtype"),
    "sub-byte dtype": (safetensors({"a": entry("F4")}), "unknown dtype 'F4'"),
    "shape is a string": (safetensors({"a": entry(shape="16")}), "its shape must be"),
    "shape of floats": (safetensors({"a": entry(shape=[16.0])}), "its shape must be"),
    "shape of booleans": (safetensors({"a": entry(shape=[True, 16])}), "its shape must be"),
    "negative length": (safetensors({"a": entry(shape=[-4, -4])}), "its shape must be"),
    "rank 33": (safetensors({"a": entry(shape=[1] * 33)}), "at most 32"),
    "product that overflows": (safetensors({"a": entry(shape=[1 << 62, 4])}), "byte .*: F32 of shape .* takes"),
    "huge lengths beside a zero": (safetensors({"a": entry(shape=[0, 1 << 62], offsets=(0, 0))}, b""), "larger than"),
    "offsets beyond the end": (safetensors({"a": entry(offsets=(64, 128))}), "its data lies outside the file"),
    "offsets backwards": (safetensors({"a": entry(offsets=(64, 0))}), "data_offsets give -64"),
    "huge offsets": (safetensors({"a": entry(offsets=(HUGE, HUGE))}), "data_offsets must be two positions"),
    "overlap": (safetensors({"a": entry(), "b": entry(shape=(8,), offsets=(32, 64))}), "tensor 'b', byte .*: overlaps"),
    "gap": (safetensors({"a": entry(shape=(8,), offsets=(32, 64))}), "tensor 'a', byte .*: leaves a gap"),
    "bytes that belong to none": (safetensors({"a": entry(shape=(8,), offsets=(0, 32))}), "the file at"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}, b""), "__metadata__ must map"),
    "a boolean of 2": (safetensors({"a": entry("BOOL", (1,), (0, 1))}, b"\2"), "a boolean is neither 0 nor 1"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(tmp_path: Path, case: str) -> None:
    data, why = SAFETENSORS[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert re.search(why, load(path))


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "a\\b", "a\0b", 3, None]
)
def test_index_that_leads_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "secret.safetensors").write_bytes(save({"a": np.ones(3)}))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert re.search("isn't a file name in this folder|weight_map must map", load(folder))


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({}, "weight_map must map"),
        ({"weight_map": []}, "weight_map must map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "the shard gone.safetensors is missing"),
        ({"weight_map": {"b": "m.safetensors"}}, "tensor 'a', byte .*: the index says it is in None"),
        ({"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}, "tensor 'b': it isn't in the shard"),
    ],
)
def test_index_that_does_not_fit(tmp_path: Path, index: Any, why: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(save({"a": np.ones(3)}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(qc.FormatError, match=why):
        qc.load(tmp_path)


def test_two_shards_with_one_name(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(save({"x": np.ones(3)}))
    with pytest.raises(qc.FormatError, match=r"tensor 'x', byte \d+: a\.safetensors has a tensor of that name"):
        qc.load(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    begin = time.monotonic()
    with pytest.raises(qc.FormatError, match="not a regular file"):
        qc.load(tmp_path / "m.gguf")
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "byte 0: the file is empty"),
        (b"PK\3\4 and so on", "pickle or zip"),
        (b"\x80\x02}q\0.", "pickle or zip"),
        (b"hello world, hello", "not a format that is read"),
        (b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "protobuf"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    assert why in load(tmp_path / "m.gguf")


# --- GGUF -----------------------------------------------------------------------------------------------------


def string(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return U64.pack(len(data)) + data


def info(name: bytes | str = "w", shape: Any = (32,), kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    dims = b"".join(map(U64.pack, shape))
    return string(name) + U32.pack(len(shape) if rank is None else rank) + dims + U32.pack(kind) + U64.pack(offset)


def gguf(
    infos: Any = (),
    pairs: Any = (),
    data: int = 256,
    tensors: int | None = None,
    count: int | None = None,
    version: int = 3,
) -> bytes:
    header = b"GGUF" + U32.pack(version) + U64.pack(len(infos) if tensors is None else tensors)
    header += U64.pack(len(pairs) if count is None else count) + b"".join(pairs) + b"".join(infos)
    return header + b"\0" * (-len(header) % 32 + data)


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return string(key) + U32.pack(kind) + value


GGUF = {
    "version 1": (gguf(version=1), "byte 4: GGUF version 1"),
    "big-endian": (gguf(version=3 << 24), "byte 4: a big-endian GGUF file"),
    "more tensors than bytes": (gguf(tensors=HUGE), "don't fit into"),
    "more pairs than bytes": (gguf(count=1 << 40), "don't fit into"),
    "key longer than the file": (gguf(pairs=[U64.pack(HUGE) + b"a"]), "a key lies outside the file"),
    "a key twice": (gguf(pairs=[pair("a", 4, U32.pack(1))] * 2), "the key 'a' occurs twice"),
    "a key that isn't UTF-8": (gguf(pairs=[pair(b"\xff", 4, U32.pack(1))]), "a key isn't UTF-8"),
    "unknown value type": (gguf(pairs=[pair("a", 99, b"")]), "'a' has the type 99"),
    "string beyond the end": (gguf(pairs=[pair("a", 8, U64.pack(1 << 62))]), "the value of 'a' lies outside"),
    "array beyond the end": (gguf(pairs=[pair("a", 9, U32.pack(4) + U64.pack(1 << 62))]), "lies outside the file"),
    "strings beyond the end": (gguf(pairs=[pair("a", 9, U32.pack(8) + U64.pack(HUGE))]), "lies outside the file"),
    "an array of arrays": (gguf(pairs=[pair("a", 9, U32.pack(9) + U64.pack(1))]), "has the type 9"),
    "a boolean of 2": (gguf(pairs=[pair("a", 7, b"\2")]), "a boolean that is neither"),
    "alignment of zero": (gguf(pairs=[pair("general.alignment", 4, U32.pack(0))]), "power of two, not 0"),
    "alignment of 48": (gguf(pairs=[pair("general.alignment", 4, U32.pack(48))]), "power of two, not 48"),
    "alignment that is text": (gguf(pairs=[pair("general.alignment", 8, string("x"))]), "power of two, not x"),
    "rank 5": (gguf([info(shape=(1,) * 5)]), r"tensor 'w', byte \d+: 5 axes"),
    "huge rank": (gguf([info(rank=(1 << 32) - 1)]), r"tensor 'w', byte \d+: 4294967295 axes"),
    "huge length": (gguf([info(shape=(HUGE,))]), r"tensor 'w', byte \d+: a length of"),
    "product that overflows": (gguf([info(shape=(1 << 32, 1 << 32, 2))]), r"'w', byte \d+: its data lies outside"),
    "huge lengths beside a zero": (gguf([info(shape=(0, 1 << 62))]), "larger than the file"),
    "unknown type": (gguf([info(kind=77)]), r"'w', byte \d+: the type 77 isn't known"),
    "a type that was removed": (gguf([info(kind=4)]), "the type 4 isn't known"),
    "rows that aren't whole blocks": (gguf([info(shape=(33,), kind=2)]), r"rows of 33 elements aren't whole blocks"),
    "offset beyond the end": (gguf([info(offset=1 << 40)]), r"'w', byte \d+: its data lies outside the file"),
    "huge offset": (gguf([info(offset=HUGE - 31)]), "its data lies outside the file"),
    "offset that isn't aligned": (gguf([info(offset=4)]), "isn't a multiple of 32"),
    "overlap": (gguf([info("v", (33,)), info("w", offset=32)]), r"tensor 'w', byte \d+: its data overlaps"),
    "overlap behind an empty one": (
        gguf([info("v", (33,)), info("e", (0,), offset=32), info("w", offset=64)]),
        "tensor 'w', byte .* overlaps",
    ),
    "a name twice": (gguf([info("w"), info("w", offset=128)]), r"tensor 'w', byte \d+: another tensor"),
    "a name that isn't UTF-8": (gguf([info(b"\xff")]), "a tensor's name isn't UTF-8"),
    "data cut short": (gguf([info(shape=(128,))], data=100), "its data lies outside the file"),
    "NaN scales": (gguf([info(shape=(32, 4), kind=2)])[:-256] + b"\xff" * 256, r"'w', byte \d+: a scale isn't finite"),
    "an empty quantized tensor": (gguf([info(shape=(0, 4), kind=2)]), "an empty tensor of shape"),
    "a split that isn't named so": (gguf(pairs=[pair("split.count", 2, b"\2\0")]), "its name doesn't end in"),
    "more splits than can be": (gguf(pairs=[pair("split.count", 4, U32.pack(1 << 31))]), "split.count must be"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(tmp_path: Path, case: str) -> None:
    data, why = GGUF[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert re.search(why, load(path))


def split(number: int, count: int, infos: Any, total: int) -> bytes:
    values = {"split.no": number, "split.count": count}
    pairs = [pair(key, 2, struct.pack("<H", value)) for key, value in values.items()]
    return gguf(infos, [*pairs, pair("split.tensors.count", 5, struct.pack("<i", total))])


def test_gguf_splits(tmp_path: Path) -> None:
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    (tmp_path / names[0]).write_bytes(split(0, 2, [info("a")], 2))
    with pytest.raises(qc.FormatError, match=r"m-00002-of-00002\.gguf: this split of"):
        qc.load(tmp_path)
    (tmp_path / names[1]).write_bytes(split(1, 2, [info("b")], 2))
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        checkpoint = qc.load(path)
        assert set(checkpoint) == {"a", "b"}
        assert checkpoint.metadata["split.no"] == 0
    for data, why in (
        (split(0, 2, [info("b")], 2), "part 2 of 2"),
        (split(1, 2, [info("a")], 2), "another split has a tensor of that name"),
        (split(1, 2, [info("b"), info("c", offset=128)], 2), "says 2 tensors, the 2 files hold 3"),
    ):
        (tmp_path / names[1]).write_bytes(data)
        with pytest.raises(qc.FormatError, match=why):
            qc.load(tmp_path / names[0])


# --- configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [name for name in makers.MAKERS if name != "hqq"])
@pytest.mark.parametrize("value", [None, 0, -1, 1 << 70, 1.5, True, "x", [], {}, [[]]], ids=repr)
def test_configs_of_wrong_types(tmp_path: Path, format: str, value: Any) -> None:
    made = makers.MAKERS[format]()
    place = "quantization" if format == "mlx" else "quantization_config"
    path = tmp_path / "m"
    for key in [None, *made.config[place]]:
        changed = json.loads(json.dumps(made.config))
        if key is None:
            changed[place] = value
        else:
            changed[place][key] = value
        message = str(path)
        try:
            read_all(makers.write(path, made._replace(config=changed)))
        except (qc.FormatError, qc.UnsupportedError) as error:
            message = str(error)
        assert str(path) in message


def bomb(kind: str, size: int) -> bytes:
    """A file of about that size that is all header, every few bytes of it an object."""
    if kind == "lists":
        text = b'{"a":[' + b"[]," * (size // 3) + b"[]]}"
        return U64.pack(len(text)) + text
    if kind == "tensors":
        entries = (b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(size // 52))
        text = b"{" + b",".join(entries) + b"}"
        return U64.pack(len(text)) + text
    if kind == "gguf":
        infos = [info(f"{i:x}", (0,)) for i in range(size // 40)]
        return gguf(infos)
    initialisers = b"".join(b"\x2a\x0a\x08\x00\x10\x02\x42\x04%04x" % i for i in range(1 << 16))
    many = initialisers * (size // len(initialisers))
    return b"\x08\x0a\x3a" + varint(len(many)) + many


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize("kind", ["lists", "tensors", "gguf", "onnx"])
def test_memory_of_a_file_that_is_all_header(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ALLOWANCE", 1 << 20)
    path = tmp_path / "m"
    path.write_bytes(bomb(kind, 4 << 20))
    tracemalloc.start()
    try:
        assert re.search("more than any model has|the same name", load(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + (2 << 20)


def test_memory_of_a_vocabulary_stays_in_the_file(tmp_path: Path) -> None:
    count = 200_000
    words = U32.pack(8) + U64.pack(count) + b"".join(string(f"{i:x}") for i in range(count))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([info()], [pair("words", 9, words)]))
    tracemalloc.start()
    try:
        checkpoint = qc.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size
    assert checkpoint.metadata["words"][-1] == f"{count - 1:x}"
