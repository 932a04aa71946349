"""SmolLM2 as a user meets it; what runs the real model for long is marked slow."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import quantcore
from quantcore import dispatch
from quantcore.formats.commands import convert
from quantcore_examples.fetch import SMOLLM2, fetch_model
from quantcore_examples.generate import generate
from quantcore_examples.gguf_tokenizer import GgufTokenizer
from quantcore_examples.language_model import LanguageModel
from quantcore_examples.smollm2 import smollm2


@pytest.fixture(scope="session")
def file() -> Path:
    return fetch_model(source=SMOLLM2) / SMOLLM2.files[0].name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([" "], "the prompt must not be empty"),
        (["--backend", "nonesuch"], "no backend is called 'nonesuch'"),
        (["--model", "/no/such/file"], "there is none at"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--precision", "best"], "--precision must be one of"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    app = typer.Typer()
    app.command()(smollm2)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def run(*arguments: str) -> tuple[str, str]:
    app = typer.Typer()
    app.command()(smollm2)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.parametrize("precision", ["default", "fast"])
def test_a_text_is_continued(file: Path, precision: str) -> None:
    text, summary = run("The capital of France is", "--complete", "--max-tokens", "8", "--precision", precision)
    assert text.startswith("The capital of France is Paris.")
    assert re.fullmatch(r"numpy: prefill 5 tokens, [\d.]+ tokens/s; decode 7 tokens, [\d.]+ tokens/s\n", summary)


def test_a_question_is_answered(file: Path) -> None:
    text, _ = run("What is the capital of France?", "--max-tokens", "12", "--backend", "torch")
    assert "Paris" in text


@pytest.mark.filterwarnings("default::quantcore.PerformanceWarning")
def test_what_is_slower_is_said_in_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    _, notes = run("Hello", "--complete", "--max-tokens", "1", "--backend", "mlx", "--precision", "highest")
    note, summary = notes.splitlines()
    assert re.match(r"Note: dot of x .* is computed by the slower backend 'array_api'", note)
    assert summary.startswith("mlx: prefill")


def test_text_survives_the_tokenizer_and_never_becomes_control_tokens(file: Path) -> None:
    tokenizer = GgufTokenizer(quantcore.load(file).metadata)
    for text in ("The year 2024, naïve café 🙂\n\n  x", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2024")) == 4
    assert not tokenizer.end_ids & set(tokenizer.encode("<|im_end|><|endoftext|>"))


def test_mlx_lm_computes_the_same_from_a_converted_folder(file: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(convert)
    assert CliRunner().invoke(app, [str(file), str(tmp_path / "mlx")]).exit_code == 0
    theirs, tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    ours = LanguageModel.load(file)
    ids = ours.tokenizer.encode("The capital of France is")
    assert tokenizer.encode("The capital of France is") == ids
    with quantcore.use_precision("highest"):
        written = list(generate(ours, ids, 6))
        expected = ours.logits([*ids, *written], [], last_only=False)
    found = np.asarray(theirs(mx.array([[*ids, *written]]))[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert found.argmax(-1)[len(ids) - 1 : -1].tolist() == written
    assert ours.tokenizer.decode(written).startswith(" Paris.")
    messages = [{"role": "user", "content": "What is the capital of France in 2024?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert chat == ours.tokenizer.encode_chat(messages[0]["content"])
    assert tokenizer.eos_token_ids <= ours.tokenizer.end_ids


@pytest.mark.slow
def test_greedy_tokens_are_the_same_on_every_library(file: Path) -> None:
    found = {}
    for library in ("numpy", "mlx", "torch", "jax"):
        model = LanguageModel.load(file, library)
        with quantcore.use_precision("highest"):
            found[library] = list(generate(model, model.tokenizer.encode("Once upon a time"), 64))
    assert len(found["numpy"]) == 64
    assert found["numpy"] == found["mlx"] == found["torch"] == found["jax"]
