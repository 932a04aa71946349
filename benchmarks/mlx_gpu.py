"""dot through quantcore against MLX's own calls, on the GPU that MLX finds; prints a table with the card's name."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import quantcore as qc
from quantcore.testing import oracle

RESULTS = Path(__file__).parent / "results" / "mlx_gpu.json"


def median_us(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(5):
        mx.eval(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    if mx.default_device() == mx.cpu:
        raise SystemExit("MLX finds no GPU here")
    card = str(mx.device_info().get("device_name", mx.default_device()))
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((4096, 4096)).astype(np.float16)
    qw = qc.quantize(dense)
    exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)
    moved, weight = qw.to("mlx"), mx.array(dense)
    print(f"{card}: 4096×4096, int4 g64, float16, µs (median of {repeats})")
    rows = []
    for m in (1, 8):
        x = rng.standard_normal((m, 4096)).astype(np.float16)
        xm = mx.array(x)
        result = np.asarray(qc.dot(xm, moved, out_dtype="float32")).astype(np.float64)
        wanted = oracle.product(x, exact)
        leaves = (moved.packed, moved.scales, moved.biases)

        def direct(xm: Any = xm, leaves: Any = leaves) -> Any:
            return mx.quantized_matmul(xm, *leaves, group_size=64, bits=4)

        row = {
            "M": m,
            "quantcore": median_us(lambda xm=xm: qc.dot(xm, moved), repeats),
            "mx.quantized_matmul": median_us(direct, repeats),
            "dense float16": median_us(lambda xm=xm: xm @ weight.T, repeats),
            "NMSE": oracle.nmse(result - wanted, wanted, x, exact),
        }
        print(row, flush=True)
        rows.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"card": card, "mlx": mx.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
