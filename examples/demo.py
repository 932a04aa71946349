"""The command ``quantcore demo``: semantic search with a quantized sentence encoder, on every chosen backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import quantcore

from . import backend_choice, options, report
from .backend_choice import BackendChoiceError, Choice
from .checkpoint import EMBEDDING_TABLE, CheckpointError, is_matrix
from .fetch import FetchError, fetch_model
from .measure import REFERENCE_SIMILARITIES, Evaluation, Size, evaluate, matches_reference, reference_similarities
from .options import OptionError
from .sentence_model import SentenceModel
from .sentences import SENTENCES

FAILED = 1
WRONG_USE = 2


class ReferenceMismatchError(RuntimeError):
    """The float32 model doesn't reproduce its published similarities, so that nothing measured on it would count."""


def demo(
    query: Annotated[str, typer.Argument(help="What to search for.")] = "how do plants make food?",
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Backends to run on.", show_default="those of numpy,mlx that are ready"),
    ] = None,
    bits: Annotated[str, typer.Option(metavar="1|2|3|4|5|6|8", help="Bits of a quantized weight.")] = "4",
    group_size: Annotated[
        str, typer.Option(metavar="16|32|64|128|256|row", help="Weights that share a scale and a bias.")
    ] = "64",
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of all-MiniLM-L6-v2.", show_default="fetched into the cache"),
    ] = None,
    top: Annotated[str, typer.Option(metavar="N", help="Number of sentences to show.")] = "3",
) -> None:
    """Search a few dozen sentences with all-MiniLM-L6-v2, quantized, and show what quantization costs and saves."""
    console, messages = Console(), Console(stderr=True)
    with _errors_in_one_line(messages):
        query = options.parse_text(query, "query")
        code_bits, codes_per_group = options.parse_bits(bits), options.parse_group_size(group_size)
        count = options.parse_top(top, len(SENTENCES))
        choices = _choose(backend, messages)
        original = SentenceModel.load(_model_folder(model, messages))

        originals = _on_each_library(original, choices)
        _check_reference(console, messages, originals)
        with messages.status("Quantizing"):
            quantized = original.quantize(code_bits, codes_per_group, backend="numpy")
        _report_sizes(console, original, quantized)
        _compare(console, messages, originals, _on_each_library(quantized, choices), query, count)


@contextmanager
def _errors_in_one_line(messages: Console) -> Iterator[None]:
    """End the command with a message instead of a traceback for whatever a user can mend."""
    try:
        yield
    except (OptionError, BackendChoiceError, CheckpointError, quantcore.BackendUnavailableError) as error:
        _print_error(messages, error)
        raise typer.Exit(WRONG_USE) from error
    except (FetchError, ReferenceMismatchError, quantcore.QuantcoreError) as error:
        _print_error(messages, error)
        raise typer.Exit(FAILED) from error


def _print_error(messages: Console, error: Exception) -> None:
    _print_line(messages, f"Error: {error}", style="red")


def _print_line(messages: Console, text: str, style: str | None = None) -> None:
    messages.print(" ".join(text.split()), style=style, markup=False, highlight=False, soft_wrap=True)


def _choose(names: str | None, messages: Console) -> tuple[Choice, ...]:
    if names is not None:
        return backend_choice.named(options.parse_names(names))
    ready, absent = backend_choice.usual()
    for line in absent:
        _print_line(messages, f"Left out: {line}")
    if not ready:
        raise BackendChoiceError("none of the backends numpy and mlx is ready; see quantcore backends")
    return ready


def _model_folder(chosen: str | None, messages: Console) -> Path:
    if chosen is None:
        return fetch_model(messages)
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise OptionError(
            f"--model must be a folder with config.json, tokenizer.json and model.safetensors; got {chosen!r}"
        )
    return folder


def _on_each_library(model: SentenceModel, choices: Sequence[Choice]) -> dict[str, SentenceModel]:
    """Return the model by backend name, moved to the library that the backend computes on."""
    return {choice.backend: model.to(choice.library) for choice in choices}


def _check_reference(console: Console, messages: Console, originals: Mapping[str, SentenceModel]) -> None:
    similarities = {}
    for backend, model in originals.items():
        with messages.status(f"Computing the float32 reference on {backend}"), quantcore.use_backend(backend):
            similarities[backend] = reference_similarities(model)
    report.print_reference(console, similarities)
    for backend, found in similarities.items():
        if not all(map(matches_reference, found, (reference for _, _, reference in REFERENCE_SIMILARITIES))):
            raise ReferenceMismatchError(
                f"on {backend}, this float32 model doesn't give the reference similarities of all-MiniLM-L6-v2; "
                "nothing further was measured"
            )


def _report_sizes(console: Console, original: SentenceModel, quantized: SentenceModel) -> None:
    matrices = [name for name in original.weights if is_matrix(name)]
    before = {name: original.weights[name] for name in matrices}
    after = {name: quantized.weights[name] for name in matrices}
    sizes = {
        "whole model": (Size.of(original.weights), Size.of(quantized.weights)),
        f"its {len(matrices)} matrices": (Size.of(before), Size.of(after)),
    }
    report.print_sizes(console, str(after[EMBEDDING_TABLE].scheme), sizes)


def _compare(
    console: Console,
    messages: Console,
    originals: Mapping[str, SentenceModel],
    quantized: Mapping[str, SentenceModel],
    query: str,
    top: int,
) -> None:
    """Search and measure on every backend, all of which compute on the same packed weights."""
    evaluations = []
    for backend in quantized:
        with messages.status(f"Searching and measuring on {backend}"):
            evaluations.append(_evaluate(messages, backend, originals[backend], quantized[backend], query, top))
        report.print_hits(console, query, SENTENCES, evaluations[-1])
    report.print_quality(console, SENTENCES, evaluations)
    report.print_agreement(console, evaluations)


def _evaluate(
    messages: Console, backend: str, original: SentenceModel, quantized: SentenceModel, query: str, top: int
) -> Evaluation:
    """Evaluate on the backend alone, or where it refuses the scheme, on the one that stands in for it."""
    try:
        with quantcore.use_backend(backend):
            return evaluate(backend, original, quantized, query, SENTENCES, top)
    except quantcore.UnsupportedError as error:
        substitute = quantcore.explain("take", quantized.weights[EMBEDDING_TABLE]).backend
        if substitute is None:
            raise
        _print_line(messages, f"Note: {substitute} stands in for {backend}: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", quantcore.PerformanceWarning)  # the note says it
        return evaluate(f"{substitute} on {quantized.library}", original, quantized, query, SENTENCES, top)
