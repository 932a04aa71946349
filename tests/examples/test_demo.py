"""The demo as a user meets it: its tables, and one line for every wrong use."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

import quantcore
from quantcore_examples import demo as demo_module
from quantcore_examples import measure, options, report
from quantcore_examples.demo import demo
from quantcore_examples.fetch import FetchError
from quantcore_examples.search import nearest
from quantcore_examples.sentences import SENTENCES

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    app = typer.Typer()
    app.command("demo")(demo)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_it_shows_reference_hits_sizes_cosines_and_time(run: Run, model_folder: Path) -> None:
    result = run("--backend", "numpy", "--model", str(model_folder), "--top", "2")
    assert result.exit_code == 0, result.output
    for words in ("0.6660 ✓", "0.1046 ✓", "0.1411 ✓", "affine-int4-g64", "32.00 -> 5.00", "90.26", "mean cosine"):
        assert words in result.stdout
    assert 'numpy: top 2 of 40 for "how do plants make food?"' in result.stdout
    assert "Leaves turn sunlight" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout


@pytest.fixture
def few_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search less, since MLX's CPU build for Linux takes a tenth of a second for a sentence."""
    pytest.importorskip("mlx.core", exc_type=ImportError)
    monkeypatch.setattr(demo_module, "SENTENCES", SENTENCES[:4] + SENTENCES[20:24])
    monkeypatch.setattr(measure, "TIMED_SENTENCES", 2)


@pytest.mark.usefixtures("few_sentences")
def test_backends_find_the_same_and_agree(run: Run, model_folder: Path) -> None:
    options = ("--backend", "numpy,mlx,torch,jax", "--bits", "8", "--group-size", "32", "--model", str(model_folder))
    result = run("where can I hear music?", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("✓") == 12
    on_numpy, *elsewhere = re.findall(r"top 3 of 8 .*?\n(.*?)└", result.stdout, re.DOTALL)
    assert elsewhere == [on_numpy] * 3
    differences = re.findall(r"numpy and (\w+): embeddings differ by at most\s+(\S+)\.", result.stdout)
    assert [name for name, _ in differences] == ["mlx", "torch", "jax"]
    assert max(float(most) for _, most in differences) < 1e-4


@pytest.mark.usefixtures("few_sentences")
def test_a_scheme_that_a_backend_refuses_goes_to_a_substitute_by_name(run: Run, model_folder: Path) -> None:
    result = run("--backend", "mlx", "--group-size", "256", "--model", str(model_folder))
    assert result.exit_code == 0, result.output
    assert "Note: array_api stands in for mlx: no backend computes this take" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "array_api on mlx: top 3" in result.stdout


def test_one_group_a_row_is_what_row_means(run: Run, model_folder: Path) -> None:
    result = run("--backend", "numpy", "--group-size", "row", "--model", str(model_folder))
    assert result.exit_code == 0, result.output
    assert "quantization to affine-int4-row" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "7"], "--bits must be one of 1, 2, 3, 4, 5, 6, 8; got '7'"),
        (["--bits", "four"], "--bits must be one of"),
        (["--bits", "-4"], "--bits must be one of"),
        (["--bits", "04"], "--bits must be one of"),
        (["--group-size", "48"], "--group-size must be one of 16, 32, 64, 128, 256, row; got '48'"),
        (["--group-size", ""], "--group-size must be one of"),
        (["--top", "0"], "--top must be a whole number from 1 to 40; got '0'"),
        (["--top", "41"], "--top must be"),
        (["--top", "²"], "--top must be"),
        (["--backend", "nonesuch"], "no backend is called 'nonesuch'; there are"),
        (["--backend", " , "], "--backend must name at least one backend"),
        (["--model", "/no/such/folder"], "--model must be a folder with config.json"),
        ([""], "the query must not be empty"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_the_model_is_wrong_use(run: Run, tmp_path: Path) -> None:
    result = run("--backend", "numpy", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "config.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def fake_backends(**states: str) -> Callable[[], list[SimpleNamespace]]:
    return lambda: [
        SimpleNamespace(
            name=name,
            state=state,
            reason="mlx is not installed",
            install_hint="pip install mlx",
            library=name,
        )
        for name, state in states.items()
    ]


def test_a_backend_asked_for_that_is_unavailable_is_wrong_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantcore, "backends", fake_backends(numpy="READY", mlx="UNAVAILABLE"))
    result = run("--backend", "numpy,mlx")
    assert result.exit_code == 2
    assert "backend 'mlx' is UNAVAILABLE: mlx is not installed; pip install mlx" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unavailable_backend_is_left_out_when_none_was_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr(quantcore, "backends", fake_backends(mlx="UNAVAILABLE", numpy="READY"))
    result = run("--model", str(model_folder))
    assert result.exit_code == 0, result.output
    assert "Left out: backend 'mlx' is UNAVAILABLE" in result.stderr
    assert "numpy: top 3" in result.stdout


def test_no_backend_ready_at_all_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantcore, "backends", fake_backends(mlx="UNAVAILABLE"))
    result = run()
    assert result.exit_code == 2
    assert "none of the backends numpy and mlx is ready" in result.stderr


def test_a_failed_fetch_is_one_line_and_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_console: Console) -> Path:
        raise FetchError("offline")

    monkeypatch.setattr(demo_module, "fetch_model", fail)
    result = run("--backend", "numpy")
    assert result.exit_code == 1
    assert "--model FOLDER" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_that_misses_the_reference_is_a_clear_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr(demo_module, "reference_similarities", lambda _model: (0.6660, 0.2, 0.1411))
    result = run("--backend", "numpy", "--model", str(model_folder))
    assert result.exit_code == 1
    assert "0.2000 ✗ WRONG" in result.stdout
    assert "doesn't give the reference similarities" in result.stderr
    assert "top 3" not in result.stdout


def evaluation(backend: str = "numpy") -> measure.Evaluation:
    hits = nearest(np.eye(3, dtype=np.float32)[1], np.eye(3, dtype=np.float32), 2)
    return measure.Evaluation(backend, np.eye(3, dtype=np.float32), hits, (1.0, 0.0), np.ones(3, np.float32), 0.1, 0.1)


def test_the_tables_print_on_a_stream_that_takes_ascii_only() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=stream, width=80)
    report.print_reference(console, {"numpy": (0.6660, 0.1046, 0.2)})
    report.print_hits(console, "où [bold]?", ["a", "é", "c"], evaluation())
    report.print_quality(console, ["a", "b", "c"], [evaluation()])
    report.print_agreement(console, [evaluation(), evaluation("mlx")])
    stream.seek(0)
    text = stream.read()
    assert "0.6660 ok" in text
    assert "0.2000 WRONG" in text
    assert r'"o\xf9 [bold]?"' in text
    assert "differ by at most 0.0e+00" in text


def test_nearest_orders_by_score_and_keeps_ties_in_order() -> None:
    embeddings = np.asarray([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=np.float32)
    hits = nearest(np.asarray([0.0, 1.0], dtype=np.float32), embeddings, 3)
    assert [hit.index for hit in hits] == [0, 2, 3]
    assert hits[0].score == 1.0


@pytest.mark.parametrize(("text", "names"), [("numpy", ("numpy",)), (" mlx, numpy,,mlx", ("mlx", "numpy"))])
def test_backend_names_are_read_once_each_in_order(text: str, names: tuple[str, ...]) -> None:
    assert options.parse_names(text) == names


def test_group_size_row_is_one_group_a_row() -> None:
    assert options.parse_group_size("row") is None
    assert options.parse_group_size("128") == 128


def test_the_sentences_are_a_few_dozen_different_ones() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) == 40
