"""quantcore's products on a CPU beside those of its peers, in one run, with the error and the roofline beside the time.

By default the whole matrix: 4 bits in groups of 64 on all shapes, and the other bits and groups on 4096x4096. With
--shapes, --bits or --groups, just those, where what isn't given is all shapes, 4 bits, groups of 64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import textwrap
import time
from typing import Any

from common import RESULTS, interleaved, machine, print_table, repeated, save, settle, shown, spread

MILLI = 1e3
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (576, 1536), (32768, 8192))
BITS, GROUPS = (2, 4, 8), (32, 64, 128)
ROWS = (1, 2, 4, 8, 32, 128, 512)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "QUANTCORE_NUM_THREADS",
)
COMPARED = (
    ("quantcore default", "onnxruntime MatMulNBits 4"),
    ("quantcore fast", "onnxruntime MatMulNBits 4"),
    ("quantcore highest", "onnxruntime MatMulNBits 0"),
    ("quantcore default", "numpy dense float32"),
    ("quantcore fast", "torch dense bfloat16"),
    ("quantcore default", "mlx quantized_matmul"),
)
"""Whose times are set against whose."""
STYLES = {
    "quantcore highest": ("#56b4e9", "o"),
    "quantcore default": ("#0057b7", "o"),
    "quantcore fast": ("#d62718", "o"),
    "numpy dense float32": ("#000000", "s"),
    "torch dense float32": ("#8c8c8c", "s"),
    "torch dense bfloat16": ("#b08d57", "s"),
    "onnxruntime MatMulNBits 0": ("#c5a3e0", "^"),
    "onnxruntime MatMulNBits 4": ("#7b2fa8", "^"),
    "torch int4pack float32": ("#9ccc65", "v"),
    "torch int4pack bfloat16": ("#2e7d32", "v"),
    "mlx quantized_matmul": ("#f59e0b", "D"),
}


def roofline(row: dict[str, Any], multiplications: int, limits: Any) -> dict[str, Any]:
    """What a row says of the machine's limits, as far as they are known by now."""
    least = limits and limits.roofline(row["weight_bytes"], multiplications, row["arithmetic"])
    if not least:
        return {}
    fraction = least[0] * MILLI / row["ms"]["median"]
    return {
        "roofline_ms": float(f"{least[0] * MILLI:.4g}"),
        "bound_by": least[1],
        "roofline_fraction": float(f"{fraction:.3g}"),
    }


def measured(weight: Any, x: Any, found: list[Any], too_long: dict[str, str], limits: Any, options: Any) -> list[Any]:
    """Time, error and roofline of each candidate. Those whose one call is over the limit are entered in `too_long`."""
    from cpu_candidates import error

    rows, calls, errors = [], {}, {}
    for candidate in found:
        if candidate.name in too_long:
            continue
        compute = candidate.bind(x)
        settle()
        errors[candidate.name] = error(candidate, compute(), x, weight.shape[0])
        start = time.perf_counter()
        compute()
        took = (time.perf_counter() - start) * MILLI
        if took > options.limit_ms:
            too_long[candidate.name] = f"one call with M = {len(x)} takes {took:.0f} ms"
        else:
            calls[candidate.name] = repeated(compute)
    taken = interleaved(calls, options.repeats, options.seconds, settle)
    for candidate in found:
        row: dict[str, Any] = {"candidate": candidate.name}
        rows.append(row)
        if candidate.name not in taken:
            row["skipped"] = too_long[candidate.name]
            continue
        row |= {"ms": spread(taken[candidate.name], MILLI), "nmse": float(f"{errors[candidate.name]:.3g}")}
        row |= {"arithmetic": candidate.arithmetic, "weight_bytes": candidate.weight_bytes}
        row |= roofline(row, len(x) * math.prod(weight.shape), limits)
    for ours, its in COMPARED:
        if ours in taken and its in taken:
            row = next(row for row in rows if row["candidate"] == ours)
            ratios = [mine / other for mine, other in zip(taken[ours], taken[its], strict=True)]
            row.setdefault("time_over", {})[its] = spread(ratios)
    return rows


def show(title: str, rows: list[Any]) -> None:
    """One case as a table."""
    lines, ratios = [], []
    for row in rows:
        if "skipped" in row:
            lines.append((row["candidate"], "skipped", "", ""))
            ratios.append(f"{row['candidate']} skipped: {row['skipped']}")
            continue
        limit = f"{row['roofline_fraction']:.1%} of {row['bound_by']}" if "bound_by" in row else "-"
        lines.append((row["candidate"], shown(row["ms"]), f"{row['nmse']:.1e}", limit))
        for its, ratio in row.get("time_over", {}).items():
            ratios.append(f"{row['candidate']} takes {shown(ratio)} of the time of {its}")
    print_table(title, ("", "ms: median (min-max)", "NMSE", "roofline"), lines)
    print("\n" + "\n".join(ratios))


def products(cases: list[tuple[tuple[int, int], int, int]], limits: Any, results: dict[str, Any], options: Any) -> None:
    """All the products, saved after each weight."""
    import numpy as np
    from cpu_candidates import Weight, candidates

    rng = np.random.default_rng(0)
    for shape, bits, group in cases:
        size = f"{shape[0]}x{shape[1]}, int{bits} g{group}" + (", zero points" if options.zero_points else "")
        weight = Weight(shape, bits, group, rng, own_zeros=options.zero_points)
        found, missing = candidates(weight, options.threads)
        for name, why in missing.items():
            print(f"{name} is missing for {size}: {why}")
            results["missing"].setdefault(f"int{bits}", {})[name] = why
        too_long: dict[str, str] = {}
        for rows in sorted(options.rows):
            x = rng.standard_normal((rows, shape[1]), dtype=np.float32)
            lines = measured(weight, x, found, too_long, limits, options)
            show(f"M = {rows}, weight {size}, {options.threads} threads", lines)
            case = {"shape": list(shape), "bits": bits, "group": group, "rows": rows}
            results["products"] += [case | line for line in lines]
        del found, weight
        if limits:
            limits.measure_peaks()
            results["limits"] = limits.facts()
            for row in results["products"]:
                if "ms" in row:
                    row |= roofline(row, row["rows"] * math.prod(row["shape"]), limits)
        save(options.save, results)


def conversions(results: dict[str, Any], options: Any) -> None:
    """Quantize and dequantize, 4096x4096, the latter beside copies of its output."""
    import numpy as np
    import peers

    w = np.random.default_rng(1).standard_normal((4096, 4096), dtype=np.float32)
    mx = peers.mlx()
    if mx is None:
        print("mlx is missing: no mx.quantize to compare with")
    else:
        mx.set_default_device(mx.cpu)
    for bits in options.bits or (4,):
        for op, (found, error) in peers.conversions(w, bits).items():
            if op == "dequantize":
                dense = found[0].compute()
                there = np.empty_like(dense)

                def copied(there: Any = there, dense: Any = dense) -> Any:
                    np.copyto(there, dense)
                    return there

                found += [
                    peers.Candidate("numpy: np.copyto into memory in use", copied, np.asarray),
                    peers.Candidate("numpy: copy into new memory", dense.copy, np.asarray),
                ]
            lines = peers.measured(found, error, {"shape": [4096, 4096], "bits": bits, "group": peers.GROUP}, options)
            results[op] += lines
            peers.show(f"{op} 4096x4096, int{bits} g{peers.GROUP}", "fraction that differs", lines)


def draw(name: str) -> None:
    """results/NAME.png from results/NAME.json: time by rows of x, a panel for each shape of 4 bits in groups of 64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [row for row in results["products"] if (row["bits"], row["group"]) == (4, 64) and "ms" in row]
    shapes = [list(shape) for shape in dict.fromkeys(tuple(row["shape"]) for row in rows)]
    if not shapes:
        print("no rows of 4 bits in groups of 64: no plot")
        return
    height = (len(shapes) + 2) // 2
    figure, panels = pyplot.subplots(height, 2, figsize=(10, 3.6 * height), dpi=100, squeeze=False)
    handles: dict[str, Any] = {}
    for panel, shape in itertools.zip_longest(panels.flat, shapes):
        if shape is None:
            panel.axis("off")
            continue
        for candidate, (colour, marker) in STYLES.items():
            line = [row for row in rows if row["shape"] == shape and row["candidate"] == candidate]
            if not line:
                continue
            ours = candidate.startswith("quantcore")
            look = {"linewidth": 2.8, "markersize": 6, "zorder": 3} if ours else {"linewidth": 1.2, "markersize": 4}
            times = [row["ms"]["median"] for row in line]
            (handles[candidate],) = panel.plot(
                [row["rows"] for row in line], times, color=colour, marker=marker, label=candidate, **look
            )
        counts = sorted({row["rows"] for row in rows if row["shape"] == shape})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_title(f"weight {shape[0]} × {shape[1]}", fontsize=11)
        panel.set_xlabel("M, rows of x")
        panel.set_ylabel("median time, ms")
        panel.grid(which="major", linewidth=0.5, alpha=0.5)
    rest = panels.flat[len(shapes)]
    rest.legend([handles[c] for c in STYLES if c in handles], [c for c in STYLES if c in handles], loc="center")
    cpu, date = results["machine"]["cpu"], results["machine"]["date"]
    title = f"x @ w.T on a CPU, w of 4 bits in groups of 64, {results['threads']} threads, {date}"
    figure.suptitle("\n".join([title, *textwrap.wrap(cpu, 110)]), fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png")
    print(f"drawn to benchmarks/results/{name}.png")


def chosen_cases(options: Any) -> list[tuple[tuple[int, int], int, int]]:
    """Shape, bits and group of each weight."""
    if options.shapes or options.bits or options.groups:
        return list(itertools.product(options.shapes or SHAPES, options.bits or (4,), options.groups or (64,)))
    others = [(SHAPES[0], bits, group) for bits in BITS for group in GROUPS if (bits, group) != (4, 64)]
    return [(shape, 4, 64) for shape in SHAPES] + others


def shape_of(text: str) -> tuple[int, int]:
    """NxK as two numbers."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="NxK", help="shapes of the weight")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS)
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="rows of x")
    parser.add_argument("--zero-points", action="store_true", help="each group has its own, not all the middle code")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each candidate (default 7)")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one measurement (default 0.05)")
    parser.add_argument("--threads", type=int, help="threads of every candidate (default: all CPUs allowed)")
    parser.add_argument("--limit-ms", type=float, default=4000, help="skip what takes longer a call (default 4000)")
    parser.add_argument("--save", default="cpu_peers", metavar="NAME", help="results/NAME.json and .png")
    parser.add_argument("--plot", metavar="NAME", help="only draw results/NAME.png from results/NAME.json")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.plot:
        draw(options.plot)
        return
    if options.threads is None:
        options.threads = machine()["cores"]
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(options.threads)  # read when the libraries are imported
    from cpu_candidates import versions

    results: dict[str, Any] = {
        "threads": options.threads,
        "versions": versions(),
        "settings": {"repeats": options.repeats, "seconds": options.seconds, "limit_ms": options.limit_ms},
        "zero_points": "each group's own" if options.zero_points else "the middle code",
        "limits": None,  # see cpu_limits.py
        "missing": {},
        "products": [],
        "quantize": [],
        "dequantize": [],
    }
    limits = None
    try:
        from cpu_limits import Limits
    except ImportError as problem:
        results["missing"]["limits"] = f"not installed: {problem}"
        print(f"the machine's limits can't be measured without Numba: {problem}")
    else:
        limits = Limits()
        results["limits"] = limits.facts()
        for name, value in results["limits"].items():
            print(f"{name}: {' '.join(value) if isinstance(value, list) else value}")
    for name, value in results["versions"].items():
        print(f"{name}: {value}")
    products(chosen_cases(options), limits, results, options)
    conversions(results, options)
    save(options.save, results)
    try:
        draw(options.save)
    except ImportError as problem:
        print(f"no plot: {problem}")


if __name__ == "__main__":
    main()
