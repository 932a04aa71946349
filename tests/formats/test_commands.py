"""The commands inspect, convert and verify, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from test_gguf import blocks_of, write
from typer.testing import CliRunner

import quantcore as qc
from quantcore.formats import commands

RNG = np.random.default_rng(0)
APP = typer.Typer()
for command in (commands.inspect, commands.convert, commands.verify):
    APP.command()(command)


def run(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A dense checkpoint with what comes with one."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "embed.weight": RNG.standard_normal((32, 128)).astype(np.float32),
        "layers.0.proj.weight": RNG.standard_normal((16, 128)).astype(np.float32),
        "layers.0.odd.weight": RNG.standard_normal((4, 100)).astype(np.float32),
        "layers.0.norm.weight": np.ones(128, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def test_inspect(tmp_path: Path) -> None:
    tensors = {"a.weight": (blocks_of("Q4_K"), "Q4_K"), "b.weight": (np.ones((4, 8), np.float32), None)}
    code, out, _ = run("inspect", write(tmp_path / "m.gguf", tensors))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["a.weight", "3×5×512", "affine-int4-g32", "Q4_K", "4.50", "4,320"] in lines
    assert ["b.weight", "4×8", "–", "F32", "32.00", "128"] in lines
    assert "gguf: 2 tensors, 7,712 weights, 4,448 bytes, 4.61 bits/weight" in out
    assert "NOT QUANTIZED: 1 matrices, 128 bytes, 3 % of the file" in out
    assert "a.weight" not in run("inspect", "--no-names", tmp_path / "m.gguf")[1]


def test_inspect_shows_names_that_steer_a_terminal_as_text(tmp_path: Path) -> None:
    save_file({"\x1b[2J[red]x": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    code, out, _ = run("inspect", tmp_path / "m.safetensors")
    assert code == 0
    assert "\x1b" not in out
    assert r"'\x1b[2J[red]x'" in out


def test_convert_to_bits(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rule = "embed.*=affine-int8-g32"
    code, text, _ = run("convert", model, out, "--bits", 4, "--group-size", 64, "--rules", rule)
    assert code == 0
    checkpoint = qc.load(out)
    assert {name: str(entry.scheme) for name, entry in checkpoint.entries.items()} == {
        "embed.weight": "affine-int8-g32",
        "layers.0.proj.weight": "affine-int4-g64",
        "layers.0.odd.weight": "None",
        "layers.0.norm.weight": "None",
    }
    assert "NOT QUANTIZED: 1 matrices" in text
    assert "layers.0.odd.weight" in text
    expected = qc.quantize(qc.load(model)["layers.0.proj.weight"], bits=4, group_size=64)
    np.testing.assert_array_equal(checkpoint["layers.0.proj.weight"].packed, expected.packed)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "tiny"
    assert config["quantization"]["layers.0.proj"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_convert_is_exact_by_default_and_verify_says_so(tmp_path: Path) -> None:
    source = makers.write(tmp_path / "awq", makers.awq())
    assert run("convert", source, tmp_path / "out")[0] == 0
    code, out, _ = run("verify", source, tmp_path / "out")
    assert (code, out) == (0, "3 tensors: 3 equal, 0 within the tolerance, 0 not\n")


def test_a_rule_that_matches_nothing_is_named(model: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", model, tmp_path / "o", "--bits", 4, "--rules", "lm_haed*=keep")
    assert code == 0
    assert "The rule for 'lm_haed*' matches no tensor" in out


def test_rules(model: Path, tmp_path: Path) -> None:
    run("convert", model, tmp_path / "a", "--bits", 4)
    arguments = ("--bits", 8, "--rules", "embed*=keep", "--rules", "*proj*=dense")
    code, out, _ = run("convert", tmp_path / "a", tmp_path / "b", *arguments)
    assert code == 0
    schemes = {name: str(entry.scheme) for name, entry in qc.load(tmp_path / "b").entries.items()}
    assert schemes["embed.weight"] == "affine-int4-g64"
    assert schemes["layers.0.proj.weight"] == "None"
    code, out, _ = run("convert", tmp_path / "a", tmp_path / "c", "--bits", 8)
    assert "quantized anew, which loses precision a second time: 2 tensors" in out


def test_convert_inexact(tmp_path: Path) -> None:
    source = makers.write(tmp_path / "gptq", makers.gptq(dtype=np.float32))
    code, _, error = run("convert", source, tmp_path / "out")
    assert code == 2
    assert "values would differ" in error
    assert "--inexact" in error
    assert not (tmp_path / "out").exists()
    assert run("convert", source, tmp_path / "out", "--inexact")[0] == 0


def test_convert_replaces_only_when_told(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", model, out)[0] == 0
    code, _, error = run("convert", model, out, "--bits", 4)
    assert code == 2
    assert "exists" in error
    assert "--force" in error
    assert not qc.is_quantized(qc.load(out)["embed.weight"])
    assert run("convert", model, out, "--bits", 4, "--force")[0] == 0
    assert qc.is_quantized(qc.load(out)["embed.weight"])
    assert run("convert", out, out, "--bits", 4, "--force")[0] == 0  # onto itself


def test_verify_tells_what_differs(model: Path, tmp_path: Path) -> None:
    run("convert", model, tmp_path / "out", "--bits", 4)
    code, out, _ = run("verify", model, tmp_path / "out")
    assert code == 1
    assert "4 tensors: 2 equal, 0 within the tolerance, 2 not" in out
    assert run("verify", model, tmp_path / "out", "--tolerance", 0.2)[0] == 0
    save_file({"embed.weight": np.ones((2, 2), np.float32), "more": np.ones(1)}, tmp_path / "m.safetensors")
    code, out, _ = run("verify", model, tmp_path / "m.safetensors", "--tolerance", 1e9)
    assert code == 1
    assert "shapes (32, 128) and (2, 2)" in out
    assert "missing in the first" in out
    assert out.count("missing in the second") == 3


@pytest.mark.parametrize(
    ("a", "b", "code"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), 0),
        (np.array([1.0, np.inf]), np.array([1.0, np.inf]), 0),
        (np.array([1.0, np.inf]), np.array([1.0, 2.0]), 1),
        (np.array([1.0, 1.0]), np.array([1.0, np.nan]), 1),
        (np.array([2**62 + 1]), np.array([2**62]), 1),
        (np.array([True, False]), np.array([True, False]), 0),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0),
        (np.array([0.0]), np.array([1e-9]), 1),
    ],
)
def test_verify_values(tmp_path: Path, a: Any, b: Any, code: int) -> None:
    for name, array in (("a", a), ("b", b)):
        save_file({"x": array}, tmp_path / f"{name}.safetensors")
    assert run("verify", tmp_path / "a.safetensors", tmp_path / "b.safetensors")[0] == code


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("inspect", "{tmp}/missing"), "No such file"),
        (("inspect", "{tmp}"), "no *.safetensors in it"),
        (("convert", "{model}", "{tmp}/o", "--to", "gguf"), "--to: the format that is written is mlx"),
        (("convert", "{model}", "{tmp}/o", "--bits", "7"), "bits must be one of"),
        (("convert", "{model}", "{tmp}/o", "--bits", "4", "--group-size", "16"), "groups of 16"),
        (("convert", "{model}", "{tmp}/o", "--group-size", "32"), "goes with bits (--bits)"),
        (("convert", "{model}", "{tmp}/o", "--rules", "x"), "can't read the rule 'x'"),
        (("convert", "{model}", "{tmp}/o", "--rules", "x=int4"), "can't read the scheme"),
        (("convert", "{model}", "{tmp}/o", "--rules", "*odd*=affine-int4-g32"), "'layers.0.odd.weight': quantize: 100"),
    ],
)
def test_mistakes_are_one_line(model: Path, tmp_path: Path, arguments: Any, why: str) -> None:
    code, _, error = run(*(argument.format(tmp=tmp_path, model=model) for argument in arguments))
    assert code == 2
    assert why in error
    assert not (tmp_path / "o").exists()


def test_the_commands_are_installed(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantcore.cli", "inspect", str(model)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert "safetensors: 4 tensors" in done.stdout
