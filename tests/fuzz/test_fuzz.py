"""Readers meet files that are cut short, changed in single bits and numbers, and JSON that is something else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import SEEDS, Files, write
from subject import ALLOWANCE, exercise, peak_of

FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
_POWERS = (1 << 31, 1 << 32, 1 << 63)
NUMBERS = [0, 1, 2, 7, 255, 1 << 16, *_POWERS, *(power - 1 for power in _POWERS), (1 << 64) - 1]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(NUMBERS) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("format", SEEDS)
def test_the_seeds_are_sound(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "f", SEEDS[format])
    assert exercise(path) == "read"
    size = sum(len(data) for data in SEEDS[format].values())
    assert peak_of(path) < 2 * size + ALLOWANCE


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        # Headers come first, and most of what can go wrong is in them.
        limit = max(1, draw(st.sampled_from([64, 512, len(changed)])))
        at = draw(st.integers(0, max(0, min(limit, len(changed)) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "u32", "u64", "insert", "delete", "repeat"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("u32", "u64"):
            number = draw(st.sampled_from(NUMBERS))
            new = struct.pack("<Q", number)[: 4 if kind == "u32" else 8]
            changed[at : at + len(new)] = new
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del changed[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + draw(st.integers(1, 128))]
    return bytes(changed)


@pytest.mark.parametrize("format", SEEDS)
@FUZZ
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, format: str, data: st.DataObject) -> None:
    files = dict(SEEDS[format])
    name = data.draw(st.sampled_from(sorted(files)))
    files[name] = data.draw(mutations(files[name]))
    path = write(tmp_path / "f", files)
    exercise(path)
    assert peak_of(path) < 2 * sum(map(len, files.values())) + ALLOWANCE


@pytest.mark.parametrize("format", SEEDS)
def test_every_length(tmp_path: Path, format: str) -> None:
    """Cut anywhere in its first kilobyte, and here and there beyond, no file is taken for a sound one."""
    name = next(name for name in SEEDS[format] if not name.endswith("json"))
    whole = SEEDS[format][name]
    if format in ("gguf", "gguf-model", "onnx"):  # one ends in padding, the other in fields that nothing announces
        whole = whole[:-48]
    for length in [*range(0, min(1024, len(whole)), 3), *range(1024, len(whole), 997), len(whole) - 1]:
        path = write(tmp_path / "f", SEEDS[format] | {name: whole[:length]})
        assert exercise(path) == "FormatError", length


def _changed_json(draw: Any, value: Any, depth: int = 0) -> Any:
    """The value with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and depth < 5 and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.sampled_from(["inside", "inside", "inside", "out", "add", "rename"]))
        changed = dict(value)
        if what == "inside":
            changed[key] = _changed_json(draw, value[key], depth + 1)
        elif what == "add":
            changed[draw(st.text(max_size=8))] = draw(JSON)
        else:
            own = changed.pop(key)
            if what == "rename":
                changed[draw(st.sampled_from(sorted(value)) | st.text(max_size=8))] = own
        return changed
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _changed_json(draw, value[at], depth + 1), *value[at + 1 :]]
    return draw(st.sampled_from(NUMBERS) | JSON)


@pytest.mark.parametrize("format", [name for name, files in SEEDS.items() if "config.json" in files])
@FUZZ
@given(data=st.data())
def test_changed_configs(tmp_path: Path, format: str, data: st.DataObject) -> None:
    files: Files = dict(SEEDS[format])
    name = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".json"))))
    changed = _changed_json(data.draw, json.loads(files[name]))
    files[name] = json.dumps(changed).encode("utf-8", "surrogatepass")
    exercise(write(tmp_path / "f", files))


@pytest.mark.parametrize("format", ["safetensors", "mlx", "awq", "gptq", "hqq", "compressed-tensors", "sharded"])
@FUZZ
@given(data=st.data())
def test_changed_headers(tmp_path: Path, format: str, data: st.DataObject) -> None:
    files: Files = dict(SEEDS[format])
    name = data.draw(st.sampled_from(sorted(name for name in files if name.endswith(".safetensors"))))
    (length,) = struct.unpack_from("<Q", files[name])
    header = _changed_json(data.draw, json.loads(files[name][8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    files[name] = struct.pack("<Q", len(text)) + text + files[name][8 + length :]
    exercise(write(tmp_path / "f", files))
