"""One row of x by a 32768×8192 weight of each width of code, beside 4 bits: does a code cost what its bytes do?

The weight is in groups of 64 and larger than the caches of a core, so that reading it is most of the work: a product
should take as much longer than that of 4 bits as it has more bytes. Errors are the NMSE of 256 outputs against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from common import interleaved, print_table, repeated, save, settle, shown, spread
from cpu_candidates import Weight

import quantcore
from quantcore.testing import oracle

SHAPE, GROUP = (32768, 8192), 64
BITS = (4, 2, 3, 5, 6, 8)
PRECISIONS: tuple[Any, ...] = ("default", "fast", "highest")
OUTPUTS = np.arange(0, SHAPE[0], SHAPE[0] // 256)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one measurement (default 0.05)")
    parser.add_argument("--dry", action="store_true", help="nothing is saved")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = {bits: Weight(SHAPE, bits, GROUP, rng) for bits in BITS}
    x = rng.standard_normal((1, SHAPE[1]), dtype=np.float32)
    results: dict[str, Any] = {}
    for precision in PRECISIONS:

        def product(bits: int, precision: Any = precision) -> Callable[[], Any]:
            return lambda: quantcore.dot(x, weights[bits].tensor, precision=precision)

        errors = {bits: _error(product(bits)(), x, weights[bits]) for bits in BITS}
        calls = {str(bits): repeated(product(bits)) for bits in BITS}
        taken = interleaved(calls, options.repeats, options.seconds, settle)
        results[precision] = table = {
            bits: {
                "ms": spread(taken[str(bits)], 1e3),
                "time over 4 bits": spread([a / b for a, b in zip(taken[str(bits)], taken["4"], strict=True)]),
                "bytes over 4 bits": weights[bits].tensor.nbytes / weights[4].tensor.nbytes,
                "nmse": errors[bits],
            }
            for bits in BITS
        }
        print_table(
            f"1 x {SHAPE[1]} by {SHAPE[0]} x {SHAPE[1]} in groups of {GROUP}, precision {precision}",
            ("bits", "ms: median (min-max)", "time over 4 bits", "bytes over 4 bits", "NMSE"),
            [
                (
                    str(bits),
                    shown(row["ms"]),
                    shown(row["time over 4 bits"]),
                    f"{row['bytes over 4 bits']:.2f}",
                    f"{row['nmse']:.0e}",
                )
                for bits, row in table.items()
            ],
        )
    if not options.dry:
        save("cpu_bits", results)


def _error(result: Any, x: np.ndarray[Any, Any], weight: Weight) -> float:
    exact = weight.exact(OUTPUTS)
    truth = oracle.product(x, exact)
    return float(oracle.nmse(result[:, OUTPUTS].astype(np.float64) - truth, truth, x, exact))


if __name__ == "__main__":
    main()
