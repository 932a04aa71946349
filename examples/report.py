"""The demo's tables, readable on a terminal and in a file alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .measure import (
    REFERENCE_SENTENCES,
    REFERENCE_SIMILARITIES,
    TIMED_SENTENCES,
    Evaluation,
    Size,
    matches_reference,
)


def print_reference(console: Console, similarities: Mapping[str, Sequence[float]]) -> None:
    """Print each backend's float32 similarities beside the published ones."""
    table = Table()
    table.add_column("sentences")
    table.add_column("reference", justify="right")
    for backend in similarities:
        table.add_column(backend, justify="right")
    for row, (i, j, reference) in enumerate(REFERENCE_SIMILARITIES):
        found = [_verdict(console, values[row], reference) for values in similarities.values()]
        pair = f"{REFERENCE_SENTENCES[i]}\n{REFERENCE_SENTENCES[j]}"
        table.add_row(pair, f"{reference:.4f}", *found, end_section=True)
    _print(console, "float32 model: pairwise similarities against the reference", table)


def print_sizes(console: Console, scheme: str, sizes: Mapping[str, tuple[Size, Size]]) -> None:
    """Print what parts of the model take before and after quantization."""
    table = Table()
    table.add_column("weights")
    for heading in ("float32 MB", "quantized MB", "bits per weight", "ratio"):
        table.add_column(heading, justify="right")
    for part, (before, after) in sizes.items():
        bits = f"{before.bits_per_weight:.2f} -> {after.bits_per_weight:.2f}"
        ratio = f"{before.bytes / after.bytes:.2f}"
        table.add_row(part, f"{before.megabytes:.2f}", f"{after.megabytes:.2f}", bits, ratio)
    _print(console, f"Size before and after quantization to {scheme}", table)


def print_hits(console: Console, query: str, sentences: Sequence[str], evaluation: Evaluation) -> None:
    """Print the sentences that a backend found, with their scores."""
    title = f'{evaluation.backend}: top {len(evaluation.hits)} of {len(sentences)} for "{query}"'
    table = Table()
    table.add_column("score", justify="right")
    table.add_column("float32", justify="right")
    table.add_column("sentence")
    for hit, float_score in zip(evaluation.hits, evaluation.float_scores, strict=True):
        table.add_row(f"{hit.score:.4f}", f"{float_score:.4f}", _plain(console, sentences[hit.index]))
    _print(console, title, table)


def print_quality(console: Console, sentences: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """Print how near the quantized embeddings are to the float32 ones, and how long a sentence takes."""
    table = Table()
    table.add_column("backend")
    for heading in ("mean cosine", "min cosine", "float32 ms", "quantized ms"):
        table.add_column(heading, justify="right")
    for result in evaluations:
        times = (f"{1e3 * result.float_seconds:.2f}", f"{1e3 * result.quantized_seconds:.2f}")
        table.add_row(result.backend, f"{np.mean(result.cosines):.5f}", f"{np.min(result.cosines):.5f}", *times)
    _print(console, "Quantized against float32 embeddings, and time per sentence", table)
    console.print(
        f"Cosines over the {len(sentences)} sentences. Time: one sentence at a time, median of {TIMED_SENTENCES}, "
        "after one that isn't counted; tokenizing and copying the embedding to NumPy included.",
        highlight=False,
    )


def print_agreement(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print how far the backends' embeddings, computed from the same packed weights, lie apart."""
    first, *others = evaluations
    for other in others:
        difference = np.max(np.abs(other.embeddings - first.embeddings))
        console.print(
            f"Same packed weights, {first.backend} and {other.backend}: embeddings differ by at most {difference:.1e}.",
            highlight=False,
        )


def _verdict(console: Console, similarity: float, reference: float) -> Text:
    ascii_only = console.options.ascii_only
    if matches_reference(similarity, reference):
        return Text(f"{similarity:.4f} {'ok' if ascii_only else '✓'}", style="green")
    return Text(f"{similarity:.4f} {'WRONG' if ascii_only else '✗ WRONG'}", style="bold red")


def _plain(console: Console, text: str) -> Text:
    """Keep markup in a text from being obeyed, and characters from being printed that the stream can't encode."""
    return Text(text.encode(console.encoding, "backslashreplace").decode(console.encoding))


def _print(console: Console, title: str, table: Table) -> None:
    console.print(_plain(console, title), style="bold")
    console.print(table)
    console.print()
