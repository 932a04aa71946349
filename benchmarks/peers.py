"""Quantized products beside their peers, in one run, with the error beside the time.

Every candidate computes the same product with the same weight, in turns. The error is that of DESIGN: squared error
against a float64 product with the exact weight, over the square of the true result, per row of x, the worst row
counting. Dense peers multiply by the dequantized weight, so all are measured against the same truth.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from common import interleaved, print_table, repeated, save, settle, shown, spread

MILLI = 1e3
SHAPES = ((4096, 4096), (1024, 1024))
ROWS = (1, 8, 128)
BITS = (4, 8)
GROUP = 64


class Candidate(NamedTuple):
    """Something that computes the product, or quantizes, or dequantizes: `compute` gives an evaluated result."""

    name: str
    compute: Callable[[], Any]
    numpy: Callable[[Any], np.ndarray[Any, Any]]


def as_numpy(result: Any) -> np.ndarray[Any, Any]:
    """NumPy's own, or MLX's, as float64."""
    return np.asarray(result).astype(np.float64)


def products(w: Any, x: Any, qw: Any, exact: Any) -> tuple[list[Candidate], Callable[[Any], float]]:
    """Who multiplies x by the weight, and the error of a result."""
    import quantcore
    from quantcore.testing import oracle

    dense = quantcore.dequantize(qw).T
    found = [
        Candidate("numpy: dense float32", lambda: x @ dense, as_numpy),
        Candidate("numpy: quantcore.dot", lambda: quantcore.dot(x, qw), as_numpy),
    ]
    mx = mlx()
    if mx is not None:
        found += _mlx_products(mx, x, qw)
    truth = oracle.product(x, exact)

    def error(result: Any) -> float:
        return oracle.nmse(as_numpy(result) - truth, truth, x, exact)

    return found, error


def _mlx_products(mx: Any, x: Any, qw: Any) -> list[Candidate]:
    import quantcore

    x, qw = quantcore.to_library(x, "mlx"), qw.to("mlx")
    dense = mx.contiguous(quantcore.dequantize(qw)).T
    leaves, options = qw.flatten()[0], {"group_size": GROUP, "bits": qw.scheme.bits, "transpose": True}
    mx.eval(x, dense, *leaves)
    candidates = {
        "mlx: dense float32": lambda: mx.matmul(x, dense),
        "mlx: mx.quantized_matmul": lambda: mx.quantized_matmul(x, *leaves, **options),
        "mlx: quantcore.dot": lambda: quantcore.dot(x, qw),
        "mlx: quantcore.dot, array_api backend": lambda: quantcore.dot(x, qw, backend="array_api"),
    }
    return [Candidate(name, _evaluated(mx, compute), as_numpy) for name, compute in candidates.items()]


def conversions(w: Any, bits: int) -> dict[str, tuple[list[Candidate], Callable[[Any], float]]]:
    """Who quantizes w, and who dequantizes it; what is off in a result, as a fraction of its elements."""
    import quantcore
    from quantcore.testing import oracle

    options = {"bits": bits, "group_size": GROUP}
    qw = quantcore.quantize(w, **options, backend="numpy")
    right = oracle.dequantize(*qw.flatten()[0], qw.scheme, w.shape[-1], "float32")
    encode = [Candidate("numpy: quantcore.quantize", lambda: quantcore.quantize(w, **options), _leaves)]
    decode = [Candidate("numpy: quantcore.dequantize", lambda: quantcore.dequantize(qw), np.asarray)]
    mx = mlx()
    if mx is not None:
        v, qm = quantcore.to_library(w, "mlx"), qw.to("mlx")
        leaves = qm.flatten()[0]
        mx.eval(v, *leaves)
        encode += [
            Candidate("mlx: mx.quantize", _evaluated(mx, lambda: mx.quantize(v, **options)), _leaves),
            Candidate("mlx: quantcore.quantize", lambda: quantcore.quantize(v, **options), _leaves),
        ]
        decode += [
            Candidate("mlx: mx.dequantize", _evaluated(mx, lambda: mx.dequantize(*leaves, **options)), np.asarray),
            Candidate("mlx: quantcore.dequantize", _evaluated(mx, lambda: quantcore.dequantize(qm)), np.asarray),
        ]
    wanted = _leaves(qw)
    return {
        "quantize": (encode, lambda result: float(np.mean(_leaves(result) != wanted))),
        "dequantize": (decode, lambda result: float(np.mean(np.asarray(result) != right))),
    }


def _leaves(result: Any) -> np.ndarray[Any, Any]:
    """Packed words, and the bits of scales and biases, in one row."""
    parts = result.flatten()[0] if hasattr(result, "flatten") else result
    return np.concatenate([np.asarray(part).view(np.uint32).reshape(-1) for part in parts])


def _evaluated(mx: Any, compute: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        result = compute()
        mx.eval(result)
        return result

    return run


def mlx() -> Any:
    """``mlx.core``, or None where it isn't installed."""
    try:
        import mlx.core as mx
    except ImportError:
        return None
    return mx


def measured(candidates: list[Candidate], error: Callable[[Any], float], case: dict[str, Any], options: Any) -> Any:
    """Time and error of each, and the time as a ratio to the first's."""
    errors = {c.name: error(c.compute()) for c in candidates}
    taken = interleaved({c.name: repeated(c.compute) for c in candidates}, options.repeats, options.seconds, settle)
    first = taken[candidates[0].name]
    return [
        {
            **case,
            "candidate": c.name,
            "ms": spread(taken[c.name], MILLI),
            "ratio_to_first": spread([mine / its for mine, its in zip(taken[c.name], first, strict=True)]),
            "error": float(f"{errors[c.name]:.3g}"),
        }
        for c in candidates
    ]


def show(title: str, what: str, rows: list[dict[str, Any]]) -> None:
    """One case as a table."""
    lines = [(r["candidate"], shown(r["ms"]), shown(r["ratio_to_first"]), f"{r['error']:.1e}") for r in rows]
    print_table(title, ("", "ms: median (min-max)", "ratio to the first", what), lines)


def kernels() -> str:
    """Which kernels the NumPy backend runs on."""
    from quantcore_backends.cpu_kernels import compiled

    return "compiled" if compiled.available() else "tiled NumPy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each candidate (default 9)")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one measurement (default 0.05)")
    parser.add_argument("--tiled", action="store_true", help="the NumPy backend without its compiled kernels")
    parser.add_argument("--quick", action="store_true", help="the small shape and 4 bits only; nothing is saved")
    options = parser.parse_args()
    if options.tiled:
        os.environ["QUANTCORE_COMPILED"] = "0"  # read when the backend is first used
    import quantcore
    from quantcore.testing import oracle

    rng = np.random.default_rng(0)
    found: dict[str, list[Any]] = {"products": [], "quantize": [], "dequantize": []}
    used = kernels()
    print(f"NumPy backend: {used} kernels")
    for shape in SHAPES[1:] if options.quick else SHAPES:
        w = rng.standard_normal(shape, dtype=np.float32)
        for bits in BITS[:1] if options.quick else BITS:
            qw = quantcore.quantize(w, bits=bits, group_size=GROUP)
            exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, shape[-1])
            size = f"{shape[0]}x{shape[1]}, {qw.scheme}"
            case = {"shape": shape, "scheme": str(qw.scheme)}
            for rows in ROWS:
                x = rng.standard_normal((rows, shape[-1]), dtype=np.float32)
                lines = measured(*products(w, x, qw, exact), {**case, "rows": rows}, options)
                found["products"] += lines
                show(f"dot: M = {rows}, weight {size}", "NMSE", lines)
            for op, (candidates, error) in conversions(w, bits).items():
                lines = measured(candidates, error, case, options)
                found[op] += lines
                show(f"{op} {size}, float32", "fraction that differs", lines)
    if not options.quick:
        save("peers-tiled" if options.tiled else "peers", {"numpy_kernels": used, **found})


if __name__ == "__main__":
    main()
