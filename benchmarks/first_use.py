"""How long the first products take on a machine, where kernels are compiled, and in each process after that.

Every measurement is a new process with a cache of its own on the disk, empty at first, full the second time. What
comes first pays for what the later ones use as well. Beside them, the least that Numba takes: to compile ``x + 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from common import print_table, save, shown, spread

_BEGIN = """
import json, time, warnings
import numpy as np
warnings.simplefilter("ignore")
taken, start = {}, time.perf_counter()
def done(what):
    global start
    taken[what] = time.perf_counter() - start
    start = time.perf_counter()
"""
_PRODUCTS = """
import quantcore as qc
w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
qw = qc.quantize(w, "affine-int4-g64")
done("import and quantize")
"""
CASES = {
    "Numba's x + 1": "import numba; numba.njit(lambda x: x + 1)(1); done('compile')",
    "numpy": f"""{_PRODUCTS}
for rows in (1, 8):
    for precision in ("default", "highest"):
        qc.dot(w[:rows], qw, precision=precision)
        done(f"{{rows}} x 512, {{precision}}")
""",
    "jax.jit": f"""
import jax
start = time.perf_counter()
{_PRODUCTS}
qw = qw.to("jax")
for rows in (1, 8):
    jax.jit(qc.dot)(w[:rows], qw).block_until_ready()
    done(f"{{rows}} x 512, default")
""",
}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="empty caches of each (default 3)")
    parser.add_argument("--dry", action="store_true", help="nothing is saved")
    options = parser.parse_args()
    seconds: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in range(options.repeats):
        for name, code in CASES.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("empty", "full"):
                    for what, taken in _run(code, cache).items():
                        seconds.setdefault((name, what), {}).setdefault(state, []).append(taken)
    results: dict[str, Any] = {}
    for (name, what), taken in seconds.items():
        results.setdefault(name, {})[what] = {state: spread(values) for state, values in taken.items()}
    rows = [
        (name, what, shown(by["empty"]), shown(by["full"])) for name, one in results.items() for what, by in one.items()
    ]
    print_table("Seconds in a new process: median (min-max)", ("", "what", "cache empty", "cache full"), rows)
    if not options.dry:
        save("first_use", {"unit": "s", "weight": "512 x 512, affine-int4-g64", "seconds": results})


def _run(code: str, cache: str) -> dict[str, float]:
    """What a process says it took."""
    done = subprocess.run(
        [sys.executable, "-c", f"{_BEGIN}{code}\nprint(json.dumps(taken))"],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
