"""Products inside ``jax.jit`` on the CPU: quantcore's compiled targets beside what else one could write.

One 4096×4096 weight, int4 in groups of 64, float32 x. Beside the NumPy backend, which runs the same kernels outside of
JAX; JAX's own dense product; dequantizing inside jit, then a product; the same in tiles; and qwix, where it is
installed. Errors are the NMSE of the worst row of x against float64, as in peers.py. All hold the same weight but for
qwix's own int4, which is symmetric: its error is that of the product with its own weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from common import print_table, save
from peers import GROUP, Candidate, as_numpy, measured, show

SIDE = 4096
ROWS = (1, 8, 128)
QWIX_SAME, QWIX_OWN = "jax: qwix, the same weight", "jax: qwix, its own int4"


def candidates(x: Any, qw: Any, weights: dict[str, Any]) -> list[Candidate]:
    """Who multiplies x by the weight; the first is what the ratios are to."""
    import jax
    import jax.numpy as jnp

    import quantcore
    from quantcore_backends.jax_backend import codes, tiles

    xj, qj = jnp.asarray(x), qw.to("jax")
    dense = jnp.asarray(quantcore.dequantize(qw))
    scheme, columns = qw.scheme, qw.in_features
    highest = jax.lax.Precision.HIGHEST

    def tiled(x: Any, *leaves: Any) -> Any:
        stack = tuple(leaf[None] for leaf in leaves)
        which = jnp.zeros(1, jnp.int32)
        return tiles.product(x[None], stack, which, scheme, columns, along_rows=False, precision="default")[0]

    def decoded(x: Any, *leaves: Any) -> Any:
        return jnp.matmul(x, codes.decode(*leaves, scheme, columns).T, precision=highest)

    inside = jax.jit(quantcore.dot)
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w.T, precision=highest))
    by_decoding, by_tiles = jax.jit(decoded), jax.jit(tiled)
    leaves = qj.flatten()[0]
    found = [
        Candidate("numpy: quantcore.dot", lambda: quantcore.dot(x, qw), as_numpy),
        Candidate("jax: quantcore.dot in jit", lambda: inside(xj, qj).block_until_ready(), as_numpy),
        Candidate("jax: quantcore.dot, concrete", lambda: quantcore.dot(xj, qj).block_until_ready(), as_numpy),
        Candidate("jax: dense float32 in jit", lambda: multiply(xj, dense).block_until_ready(), as_numpy),
        Candidate("jax: dequantize, then dot", lambda: by_decoding(xj, *leaves).block_until_ready(), as_numpy),
        Candidate("jax: the same in tiles", lambda: by_tiles(xj, *leaves).block_until_ready(), as_numpy),
    ]
    return found + _of_qwix(xj, weights)


def qwix_weights(w: Any, qw: Any) -> dict[str, Any]:
    """Weights of qwix, by the candidate's name: the same as ours, and what qwix makes of w; none without qwix."""
    try:
        import qwix
    except ImportError:
        return {}
    import jax.numpy as jnp

    from quantcore_backends.cpu_kernels import unpack

    packed, scales, biases = qw.flatten()[0]
    # A bias is a whole number of scales, so that qwix's zero points hold it.
    zeros = np.where(biases == 0, 0, np.rint(-biases / scales))
    codes = jnp.asarray(unpack(packed, qw.scheme.bits, qw.in_features), jnp.uint4)
    same = qwix.QArray(codes, jnp.asarray(scales), jnp.asarray(zeros, jnp.uint4))
    own = qwix.quantize(jnp.asarray(w), "int4", channelwise_axes=[0], tiled_axes={1: GROUP})
    return {QWIX_SAME: same, QWIX_OWN: own}


def _of_qwix(x: Any, weights: dict[str, Any]) -> list[Candidate]:
    multiply = _qwix_product() if weights else None

    def candidate(name: str, weight: Any) -> Candidate:
        return Candidate(name, lambda: multiply(x, weight).block_until_ready(), as_numpy)

    return [candidate(name, weight) for name, weight in weights.items()]


def _qwix_product() -> Any:
    """The linear layer's product as qwix has it: for a float x, it makes the weight dense first."""
    import jax
    import qwix

    contracted = (((1,), (1,)), ((), ()))
    return jax.jit(lambda x, w: qwix.dot_general(x, w, contracted, precision=jax.lax.Precision.HIGHEST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each candidate (default 15)")
    parser.add_argument("--seconds", type=float, default=0.05, help="length of one measurement (default 0.05)")
    parser.add_argument("--dry", action="store_true", help="nothing is saved")
    options = parser.parse_args()
    import jax

    import quantcore
    from quantcore.testing import oracle

    jax.config.update("jax_platforms", "cpu")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    qw = quantcore.quantize(w, bits=4, group_size=GROUP)
    exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, SIDE)
    weights = qwix_weights(w, qw)
    found: list[Any] = []
    for rows in ROWS:
        x = rng.standard_normal((rows, SIDE), dtype=np.float32)

        def against(exact: Any, x: Any = x) -> Callable[[Any], float]:
            truth = oracle.product(x, exact)
            return lambda result: oracle.nmse(as_numpy(result) - truth, truth, x, exact)

        measuring = candidates(x, qw, weights)
        lines = measured(measuring, against(exact), {"shape": [SIDE, SIDE], "rows": rows}, options)
        for line, candidate in zip(lines, measuring, strict=True):
            if candidate.name == QWIX_OWN:
                line["error"] = float(f"{against(_exact(weights[QWIX_OWN]))(candidate.compute()):.3g}")
        found += lines
        show(f"M = {rows}, weight {SIDE}x{SIDE}, {qw.scheme}", "NMSE", lines)
    print_table("temporary memory inside jit, M = 1", ("", "MiB"), _memory(qw, weights))
    if not options.dry:
        save("jax_cpu", {"jax": jax.__version__, "products": found})


def _exact(weight: Any) -> Any:
    """A symmetric weight of qwix's in float64."""
    scales = np.asarray(weight.scale, np.float64)
    return np.asarray(weight.qvalue).astype(np.float64) * np.repeat(scales, GROUP, axis=1)


def _memory(qw: Any, weights: dict[str, Any]) -> list[tuple[str, str]]:
    """What the compiled product needs beyond its operands and its result."""
    import jax
    import jax.numpy as jnp

    import quantcore

    x, tensor = jnp.zeros((1, SIDE)), qw.to("jax")
    compiled = {
        "quantcore.dot": jax.jit(quantcore.dot).lower(x, tensor).compile(),
        "dequantize, then dot": jax.jit(lambda x, w: x @ quantcore.dequantize(w).T).lower(x, tensor).compile(),
    }
    if weights:
        product = _qwix_product()
        compiled |= {name.removeprefix("jax: "): product.lower(x, weight).compile() for name, weight in weights.items()}
    return [(name, f"{one.memory_analysis().temp_size_in_bytes / 2**20:.2f}") for name, one in compiled.items()]


if __name__ == "__main__":
    main()
