"""The commands ``quantcore inspect``, ``convert`` and ``verify``."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, cast

import rich.box
import rich.console
import rich.table
import rich.text
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from quantcore.errors import FormatError, QuantcoreError, UnsupportedError
from quantcore.formats.checkpoint import Checkpoint, Entry
from quantcore.formats.comparison import Difference, compare
from quantcore.formats.gguf_tokenizer import write_tokenizer
from quantcore.formats.reading import load
from quantcore.formats.recipe import Converted, Recipe, is_matrix
from quantcore.formats.writing import replacing, write_checkpoint

__all__ = ["convert", "inspect", "verify"]

_COPIED: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of the files beside the weights (tokenizer and the like) that a converted folder gets, too."""

Source = Annotated[Path, typer.Argument(help="a file, or a folder with config.json and its shards")]


def inspect(
    path: Source,
    names: Annotated[bool, typer.Option(help="list every tensor, or only the totals")] = True,
) -> None:
    """Show the tensors of a checkpoint: shapes, schemes, bits per weight, sizes, and what isn't quantized."""
    with _errors():
        checkpoint = load(path)
        console = _console()
        if names:
            table = _table("tensor", "shape", "quantized as", "stored as", "bits/weight", "bytes")
            for name, entry in checkpoint.entries.items():
                table.add_row(_plain(name), *_cells(entry))
            console.print(table)
        _print_totals(console, checkpoint)


def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(help="the folder to make")],
    to: Annotated[str, typer.Option(help="the format to write: mlx")] = "mlx",
    bits: Annotated[int | None, typer.Option(help="quantize every matrix to so many bits")] = None,
    group_size: Annotated[int | None, typer.Option(help="elements of a group, with --bits; 64 by default")] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=SCHEME, PATTERN=keep or PATTERN=dense; may be repeated, the first match decides"),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="of a GGUF's tensors: huggingface, which mlx-lm wants, or file, for its own",
            show_default="huggingface, where they are known",
        ),
    ] = None,
    inexact: Annotated[bool, typer.Option("--inexact", help="convert also what changes values")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace a checkpoint at the destination")] = False,
) -> None:
    """Convert a checkpoint to an MLX folder; exactly, unless --bits, --rules or --inexact say otherwise."""
    with _errors():
        if to != "mlx":
            raise ValueError(f"--to: the format that is written is mlx, not {to!r}")
        console = _console()
        checkpoint = _named(source, names, not inexact, console)
        recipe = Recipe.parse(bits, group_size, rules or [])
        for pattern in recipe.unmatched(checkpoint):
            _warn(console, f"The rule for {pattern!r} matches no tensor")
        state = Converted(checkpoint, recipe)
        with replacing(destination, force) as folder, _progress("Converting", checkpoint.nbytes) as advance:
            entries = checkpoint.entries
            write_checkpoint(state, folder, checkpoint.config, lambda name, _: advance(name, entries[name].nbytes))
            _copy_others(source, folder)
            if checkpoint.format == "gguf" and checkpoint.config and not (folder / "tokenizer.json").exists():
                _write_tokenizer(checkpoint, folder, console)
        if state.requantized:
            console.print(f"quantized anew, which loses precision a second time: {len(state.requantized)} tensors")
        _print_totals(console, load(destination))


def verify(
    first: Source,
    second: Source,
    tolerance: Annotated[float, typer.Option(min=0, help="allowed difference, relative to the largest value")] = 0.0,
) -> None:
    """Compare two checkpoints tensor by tensor; the exit code is 0 if they agree, 1 if not."""
    with _errors():
        one, other = _alike(load(first), load(second))
        total = agreeing = exact = 0
        table = _table("tensor", "difference", "largest", "relative")
        with _progress("Comparing", one.nbytes) as advance:
            for found in compare(one, other):
                total += 1
                agreeing += found.within(tolerance)
                exact += found.within(0)
                if not found.within(0):
                    table.add_row(_plain(found.name), *_difference_cells(found))
                if found.name in one:
                    advance(found.name, one.entries[found.name].nbytes)
    console = _console()
    if exact < total:
        console.print(table)
    console.print(f"{total} tensors: {exact} equal, {agreeing - exact} within the tolerance, {total - agreeing} not")
    raise typer.Exit(0 if agreeing == total else 1)


# --- what is printed ------------------------------------------------------------------------------------------


def _cells(entry: Entry) -> list[str]:
    size = _size(entry)
    per_weight = f"{8 * entry.nbytes / size:.2f}" if size else ""
    scheme = "–" if entry.scheme is None else str(entry.scheme)
    return ["×".join(map(str, entry.shape)) or "scalar", scheme, entry.kind, per_weight, f"{entry.nbytes:,}"]


def _size(entry: Entry) -> int:
    count = 1
    for length in entry.shape:
        count *= length
    return count


def _print_totals(console: rich.console.Console, checkpoint: Checkpoint) -> None:
    """Totals, and loudly what a quantized checkpoint leaves unquantized."""
    entries = checkpoint.entries
    weights = sum(map(_size, entries.values()))
    per_weight = 8 * checkpoint.nbytes / weights if weights else 0
    console.print(
        f"{checkpoint.format}: {len(entries)} tensors, {weights:,} weights, {checkpoint.nbytes:,} bytes, "
        f"{per_weight:.2f} bits/weight"
    )
    schemes = Counter(str(entry.scheme) for entry in entries.values() if entry.scheme is not None)
    for scheme, count in schemes.most_common():
        console.print(f"  {count} × {scheme}")
    dense = {name: entry for name, entry in entries.items() if is_matrix(name, entry)}
    if not dense:
        return
    nbytes = sum(entry.nbytes for entry in dense.values())
    share = 100 * nbytes / checkpoint.nbytes
    warning = f"NOT QUANTIZED: {len(dense)} matrices, {nbytes:,} bytes, {share:.0f} % of the file"
    console.print(warning, style="bold yellow")
    largest = sorted(dense.items(), key=lambda item: -item[1].nbytes)[:10]
    for name, entry in largest:
        console.print(rich.text.Text(f"  {_printable(name)}  {'×'.join(map(str, entry.shape))}  {entry.kind}"))
    if len(dense) > len(largest):
        console.print(f"  and {len(dense) - len(largest)} smaller ones")


def _difference_cells(found: Difference) -> list[str]:
    if found.missing:
        return [f"missing in the {found.missing}", "", ""]
    if found.shapes is not None:
        return [f"shapes {found.shapes[0]} and {found.shapes[1]}", "", ""]
    return [f"{found.count:,} values", f"{found.largest:.3g}", f"{found.relative:.3g}"]


def _printable(name: str) -> str:
    """A name as a file has it, without what could steer a terminal."""
    return name if name.isprintable() else repr(name)


def _plain(name: str) -> rich.text.Text:
    return rich.text.Text(_printable(name))


def _table(*headings: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in headings:
        right = heading in ("bits/weight", "bytes", "largest", "relative")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    return table


def _warn(console: rich.console.Console, text: str) -> None:
    console.print(_printable(text), style="bold yellow", soft_wrap=True)


def _console() -> rich.console.Console:
    return rich.console.Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


# --- helpers --------------------------------------------------------------------------------------------------


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that a user can do something about, as one line and exit code 2."""
    try:
        yield
    except (QuantcoreError, OSError, TypeError, ValueError) as error:
        print(f"quantcore: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar, and hand out what moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda _name, nbytes: progress.update(task, advance=nbytes)


def _named(source: Path, names: str | None, exact: bool, console: rich.console.Console) -> Checkpoint:
    """Open what is converted; a GGUF under the names that the option asks for, else Hugging Face's as far as known."""
    if names is not None:
        return load(source, exact=exact, names=cast(Any, names))
    try:
        return load(source, exact=exact, names="huggingface")
    except UnsupportedError as error:
        checkpoint = load(source, exact=exact)
        _warn(console, f"{error}. The file's own names are kept, which mlx-lm doesn't know")
        return checkpoint
    except FormatError as error:
        load(source, exact=exact)
        raise FormatError(f"{error} (--names file converts it without what mlx-lm needs)") from None


def _write_tokenizer(checkpoint: Checkpoint, folder: Path, console: rich.console.Console) -> None:
    try:
        write_tokenizer(checkpoint.path, checkpoint.metadata, folder)
    except (UnsupportedError, FormatError) as error:
        _warn(console, f"No tokenizer was written, which mlx_lm.load needs: {error}")


def _alike(first: Checkpoint, second: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both, a GGUF under Hugging Face's names where under its own it shares none with the other."""
    if set(first) & set(second):
        return first, second
    found = [load(one.path, names="huggingface") if one.format == "gguf" else one for one in (first, second)]
    return found[0], found[1]


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what else a folder has: the tokenizer, the generation config; never code, never other weights."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        ours = (folder / path.name).exists() or path.name == "quantize_config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not ours:
            shutil.copyfile(path, folder / path.name)
