"""Schemes: interned, immutable, readable back from their names, and the arithmetic of packed shapes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from quantcore import Scheme
from quantcore.scheme import BITS, GROUP_SIZES

ALL = [Scheme(bits=bits, group_size=group) for bits in BITS for group in (*GROUP_SIZES, None)]


def test_default_is_four_bits_in_groups_of_sixty_four() -> None:
    scheme = Scheme()
    assert (scheme.mode, scheme.bits, scheme.group_size) == ("affine", 4, 64)
    assert str(scheme) == "affine-int4-g64"
    assert repr(scheme) == "Scheme('affine-int4-g64')"


def test_every_documented_scheme_exists() -> None:
    assert {s.bits for s in ALL} == {1, 2, 3, 4, 5, 6, 8}
    assert {s.group_size for s in ALL} == {16, 32, 64, 128, 256, None}
    assert len({str(s) for s in ALL}) == len(set(ALL)) == 42


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_name_reads_back_as_the_same_object(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) is scheme
    assert Scheme.parse(scheme) is scheme


def test_row_scheme_is_named_row() -> None:
    assert str(Scheme(bits=8, group_size=None)) == "affine-int8-row"
    assert Scheme.parse("affine-int8-row").group_size is None


@pytest.mark.parametrize(
    "again",
    [
        lambda s: Scheme(s.mode, s.bits, s.group_size),
        lambda s: Scheme(bits=np.int64(s.bits), group_size=np.int32(s.group_size)),  # type: ignore[arg-type]
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: pickle.loads(pickle.dumps(s, protocol=2)),
        copy.copy,
        copy.deepcopy,
        lambda s: copy.deepcopy({"a": [s]})["a"][0],
    ],
    ids=["same arguments", "numpy integers", "pickle", "pickle protocol 2", "copy", "deepcopy", "deepcopy inside"],
)
def test_identity_is_kept(again: Any) -> None:
    scheme = Scheme(bits=5, group_size=32)
    assert again(scheme) is scheme


def test_arguments_of_an_interned_scheme_stay_plain_ints() -> None:
    scheme = Scheme(bits=np.int64(6), group_size=np.uint8(128))  # type: ignore[arg-type]
    assert type(scheme.bits) is int
    assert type(scheme.group_size) is int


def test_identity_is_kept_across_processes() -> None:
    code = (
        "import pickle, sys, quantcore\n"
        "sys.stdout.buffer.write(pickle.dumps(quantcore.Scheme(bits=3, group_size=None)))"
    )
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert pickle.loads(made) is Scheme(bits=3, group_size=None)


def test_threads_that_race_for_a_new_scheme_get_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheme, "_interned", {})
    start = threading.Barrier(8)
    made: list[Scheme] = []

    def make() -> None:
        start.wait()
        made.extend(Scheme(bits=bits, group_size=group) for bits in BITS for group in GROUP_SIZES)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 * 35
    assert len({id(scheme) for scheme in made}) == 35


def test_equality_is_identity() -> None:
    assert Scheme(bits=4) == Scheme(bits=4)
    assert Scheme(bits=4) != Scheme(bits=5)
    assert Scheme(bits=4) != "affine-int4-g64"
    assert {Scheme(bits=4): 1}[Scheme.parse("affine-int4-g64")] == 1


@pytest.mark.parametrize("name", ["mode", "bits", "group_size", "new"])
def test_immutable(name: str) -> None:
    scheme = Scheme()
    with pytest.raises(AttributeError, match="immutable"):
        setattr(scheme, name, 3)
    with pytest.raises(AttributeError, match="immutable"):
        delattr(scheme, name)
    assert str(scheme) == "affine-int4-g64"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"bits": 7}, ValueError, ["bits", "1, 2, 3, 4, 5, 6, 8", "7"]),
        ({"bits": 0}, ValueError, ["bits", "0"]),
        ({"bits": -4}, ValueError, ["bits", "-4"]),
        ({"bits": 4.0}, TypeError, ["bits", "integer", "float"]),
        ({"bits": "4"}, TypeError, ["bits", "integer", "str"]),
        ({"bits": True}, TypeError, ["bits", "integer", "bool"]),
        ({"bits": None}, TypeError, ["bits", "integer", "NoneType"]),
        ({"group_size": 48}, ValueError, ["group_size", "16, 32, 64, 128, 256", "None", "48"]),
        ({"group_size": 0}, ValueError, ["group_size", "0"]),
        ({"group_size": 64.0}, TypeError, ["group_size", "integer", "float"]),
        ({"group_size": False}, TypeError, ["group_size", "integer", "bool"]),
        ({"mode": "mxfp6"}, ValueError, ["mode", "'mxfp6'", "affine", "mxfp4", "mxfp8", "nvfp4"]),
        ({"mode": ["affine"]}, ValueError, ["mode", "affine"]),
        ({"mode": "mxfp4", "bits": 8}, ValueError, ["mxfp4", "4 bits", "groups of 32", "8 bits"]),
        ({"mode": "nvfp4", "group_size": 32}, ValueError, ["nvfp4", "groups of 16", "groups of 32"]),
        ({"mode": "mxfp8", "group_size": None}, ValueError, ["mxfp8", "a row"]),
        ({"mode": None}, ValueError, ["mode", "None", "affine"]),
    ],
)
def test_validation(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        Scheme(**arguments)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "affine",
        "affine-int4",
        "affine-int4-64",
        "int4-g64",
        "affine-int4-g64 ",
        "affine-int4-g64-x",
        "AFFINE-int4-row",
        "mxfp4-int4-g32",
        "mxfp6",
    ],
)
def test_parse_refuses_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="affine-int4-g64"):
        Scheme.parse(name)


@pytest.mark.parametrize("name", ["affine-int7-g64", "affine-int4-g48"])
def test_parse_validates(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Scheme.parse(name)


@pytest.mark.parametrize(("name", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_microscaled_modes(name: str, bits: int, group: int) -> None:
    scheme = Scheme(name)
    assert (scheme.mode, scheme.bits, scheme.group_size, scheme.has_biases) == (name, bits, group, False)
    assert str(scheme) == name
    assert scheme is Scheme(name, bits, group) is Scheme.parse(name) is pickle.loads(pickle.dumps(scheme))
    assert Scheme().has_biases


@pytest.mark.parametrize("name", [None, 4, b"affine-int4-g64", ("affine", 4, 64)])
def test_parse_refuses_other_types(name: Any) -> None:
    with pytest.raises(TypeError, match="affine-int4-g64"):
        Scheme.parse(name)


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("in_features", [1, 7, 16, 33, 100, 256, 4097])
def test_packed_shapes_are_the_smallest_that_hold_the_row(scheme: Scheme, in_features: int) -> None:
    words = scheme.words(in_features)
    assert words * 32 >= in_features * scheme.bits > (words - 1) * 32
    groups = scheme.groups(in_features)
    group = scheme.group_size or in_features
    assert groups * group >= in_features > (groups - 1) * group
    assert scheme.divides(in_features) == (in_features % group == 0)
    assert scheme.packed_shape((3, 5, in_features)) == (3, 5, words)
    assert scheme.scales_shape((3, 5, in_features)) == (3, 5, groups)


def test_shapes_of_an_empty_batch() -> None:
    assert Scheme(bits=3, group_size=32).packed_shape((0, 8, 64)) == (0, 8, 6)
    assert Scheme(bits=3, group_size=32).scales_shape([0, 8, 64]) == (0, 8, 2)
