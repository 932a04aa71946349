"""dot through quantcore against dense products, on a CUDA GPU; prints a table with the card's name.

The weight is made dense one tile at a time in plain torch operations: no kernel is tuned for it yet.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import RESULTS, print_table, shown, spread

import quantcore as qc
from quantcore.testing import oracle

MICRO = 1e6
SHAPE = (4096, 4096)
ROWS = (1, 8, 128)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    for _ in range(5):
        call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here")
    card = torch.cuda.get_device_name()
    rng = np.random.default_rng(0)
    qn = qc.quantize(rng.standard_normal(SHAPE).astype(np.float16))
    exact = oracle.exact_weight(qn.packed, qn.scales, qn.biases, qn.scheme, qn.in_features)
    qw = qn.to("torch", "cuda")
    dense = qw.dequantize()
    compiled = torch.compile(lambda x: qc.dot(x, qw), fullgraph=True)
    rows = []
    for m in ROWS:
        x = rng.standard_normal((m, SHAPE[1])).astype(np.float16)
        xt = torch.from_numpy(x).cuda()
        truth = oracle.product(x, exact)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "dense float16": lambda xt=xt: xt @ dense.T,
            "quantcore.dot": lambda xt=xt: qc.dot(xt, qw),
            "quantcore.dot, compiled": lambda xt=xt: compiled(xt),
        }
        for name, call in calls.items():
            error = oracle.nmse(call().double().cpu().numpy() - truth, truth, x, exact)
            taken = spread(seconds(call, repeats), MICRO)
            rows.append({"rows": m, "candidate": name, "us": taken, "nmse": float(f"{error:.3g}")})
    table = [(f"M = {r['rows']}: {r['candidate']}", shown(r["us"]), f"{r['nmse']:.1e}") for r in rows]
    print_table(f"{card}: {SHAPE[0]}x{SHAPE[1]}, int4 g64, float16", ("", "µs: median (min-max)", "NMSE"), table)
    found = {"card": card, "torch": torch.__version__, "shape": SHAPE, "scheme": str(qw.scheme), "results": rows}
    (RESULTS / "torch_gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
