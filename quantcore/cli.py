"""The ``quantcore`` command: what is installed, and why a call goes where it goes.

Further commands are found through the entry-point group ``quantcore.commands``: typer functions, loaded when asked
for, so that the core imports none of what they need.
"""

import sys
from importlib.metadata import entry_points
from typing import Annotated, Any, Final

import numpy as np

import quantcore
from quantcore import registry
from quantcore.dtypes import LOGICAL_DTYPES, REAL_FLOATING, numpy_dtype

try:
    import rich.box
    import rich.console
    import rich.table
    import rich.text
    import typer
except ImportError as error:  # the extra isn't installed
    raise SystemExit(f'the quantcore command needs {error.name}: pip install "quantcore-arrays[cli]"') from None

__all__ = ["main"]

COMMANDS_GROUP: Final = "quantcore.commands"

app = typer.Typer(
    help="Group-wise quantized weights for every Python array library.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def backends() -> None:
    """List every backend with its state, why it isn't ready, and what to install."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("backend", "library", "state", "priority", "reason or install hint", "from"):
        table.add_column(heading, overflow="fold")
    for record in quantcore.backends():
        why = "\n".join(filter(None, (record.reason, record.install_hint if record.reason else "")))
        library = "any" if record.library == "*" else record.library
        priority = str(record.priority) if record.library else ""
        table.add_row(record.name, library, str(record.state), priority, rich.text.Text(why), record.origin)
    _console().print(table)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="dot, matmul, gather_dot, quantize, dequantize or take")] = "dot",
    library: Annotated[str, typer.Option(help="array library of the operands")] = "numpy",
    shape: Annotated[str, typer.Option(help="shape of the weight, e.g. 4096,4096 or 8,1024,4096")] = "128,256",
    rows: Annotated[int, typer.Option(min=0, help="rows of x")] = 1,
    scheme: Annotated[str, typer.Option(help="e.g. affine-int4-g64 or affine-int8-row")] = "affine-int4-g64",
    dtype: Annotated[str, typer.Option(help="dtype of x and of the weight")] = "float32",
    transposed: Annotated[bool, typer.Option(help="whether the weight is used as x @ w, not x @ w.T")] = False,
    precision: Annotated[str, typer.Option(help="default, highest or fast")] = "default",
    backend: Annotated[str | None, typer.Option(help="ask for this backend by name")] = None,
) -> None:
    """Say which backend computes a call, and why, without computing it."""
    try:
        print(_explained(op, library, shape, rows, scheme, dtype, transposed, precision, backend))
    except (quantcore.QuantcoreError, TypeError, ValueError) as error:
        _fail(str(error))


def _explained(
    op: str,
    library: str,
    shape: str,
    rows: int,
    scheme: str,
    dtype: str,
    transposed: bool,
    precision: str,
    backend: str | None,
) -> quantcore.Explanation:
    if backend is not None:
        registry.find(backend, registry.snapshot())
    lengths = _shape(shape)
    chosen = quantcore.Scheme.parse(scheme)
    if dtype not in REAL_FLOATING:
        raise ValueError(f"--dtype must be one of {', '.join(REAL_FLOATING)}, not {dtype!r}")
    kind = numpy_dtype(dtype)
    if op == "quantize":
        w = quantcore.to_library(_blank(lengths, kind), library)
        return quantcore.explain(op, w, scheme=chosen, backend=backend)
    packed = _blank(chosen.packed_shape(lengths), np.dtype(np.uint32))
    scales = _blank(chosen.scales_shape(lengths), kind if chosen.has_biases else np.dtype(np.uint8))
    biases = scales if chosen.has_biases else None
    logical = dtype if dtype in LOGICAL_DTYPES else None
    qw = quantcore.quantized_tensor(packed, scales, biases, lengths, chosen, dtype=logical).to(library)
    qw = qw.mT if transposed else qw
    if op in ("dequantize", "take", "prepack"):
        return quantcore.explain(op, qw, backend=backend)
    contracted = qw.shape[-2 if op == "matmul" else -1]
    x = quantcore.to_library(_blank((rows, contracted), kind), library)
    return quantcore.explain(op, x, qw, precision=precision, backend=backend)


def _shape(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if len(lengths) < 2 or min(lengths) < 0:
        raise ValueError(f"--shape must be at least two lengths separated by commas, like 4096,4096, not {text!r}")
    return lengths


def _blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # A broadcast view: explaining a weight of any size takes no memory.
    return np.broadcast_to(np.zeros((), dtype), shape)


def _console() -> rich.console.Console:
    width = None if sys.stdout.isatty() else 160
    return rich.console.Console(width=width)


def _fail(message: str) -> None:
    print(f"quantcore: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _add_commands(asked: list[str]) -> None:
    """Add the commands of other packages that are asked for, or all of them to list them."""
    listing = not asked or asked == ["--help"]
    for entry in entry_points(group=COMMANDS_GROUP):
        if not listing and asked != [entry.name]:
            continue
        try:
            app.command(entry.name)(entry.load())
        except ImportError as error:
            if not listing:
                extra = f'pip install "quantcore-arrays[{entry.name}]"'
                raise SystemExit(f"quantcore: the command {entry.name} needs {error.name}; {extra}") from None


def main() -> None:
    """Run the command line."""
    _add_commands(sys.argv[1:2])
    app()


if __name__ == "__main__":
    main()
