"""Weights over several devices: eight of one host, and two processes. Each runs in processes of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import quantcore as qc
from quantcore_backends.jax_backend.sharding import shard

_COMMON = """
    import re, sys
    import numpy as np, jax, jax.numpy as jnp, quantcore as qc, quantcore.jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    def collectives(compiled):
        return re.findall(r"= \\S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\\(",
                          compiled.as_text())

    def error(y, true):
        return float(((np.asarray(y) - true) ** 2).sum() / (true ** 2).sum())

    random = np.random.default_rng(0)
    w = random.standard_normal((64, 1024)).astype(np.float32)
"""

_EIGHT = """
    mesh = Mesh(np.array(jax.devices()), ("model",))
    both = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    dot = jax.jit(qc.dot)
    checked = 0
    for scheme in ("affine-int4-g64", "affine-int3-g16", "affine-int8-row"):
        qw = qc.quantize(jnp.asarray(w), scheme)
        exact = np.asarray(qw.dequantize(), np.float64)
        for rows in (1, 24):
            for place, spec in ((mesh, P("model", None)), (mesh, P(None, "model")), (both, P("data", "model"))):
                placed = quantcore.jax.shard(qw, place, spec)
                shapes = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(placed)]
                whole = [leaf.shape for leaf in jax.tree.leaves(qw)]
                assert np.prod(shapes[0]) * 8 == np.prod(whole[0]), (shapes, whole)
                for flip in (False, True):
                    x = random.standard_normal((rows, 64 if flip else 1024)).astype(np.float32)
                    tensor, true = (placed.mT, x @ exact) if flip else (placed, x @ exact.T)
                    compiled = dot.lower(x, tensor).compile()
                    summed = spec[0] if flip else spec[1]
                    found = collectives(compiled)
                    assert set(found) <= {"all-reduce"} and bool(found) == bool(summed), (scheme, spec, flip, found)
                    assert compiled.memory_analysis().temp_size_in_bytes < 300_000
                    assert error(dot(x, tensor), true) < 1e-8, (scheme, spec, flip)
                    assert error(qc.dot(jnp.asarray(x), tensor), true) < 1e-8
                    checked += 1
        x = random.standard_normal((4, 1024)).astype(np.float32)
        gradient = jax.jit(jax.grad(lambda x, w: (qc.dot(x, w) ** 2).sum()))
        for spec in (P("model", None), P(None, "model")):
            placed = quantcore.jax.shard(qw, mesh, spec)
            assert error(gradient(x, placed), 2 * x @ exact.T @ exact) < 1e-8
            assert "all-gather" not in collectives(gradient.lower(x, placed).compile())
    # rows of x over one axis, the weight over the other: data and tensor parallel at once
    qw = qc.quantize(jnp.asarray(w), "affine-int4-g64")
    placed = quantcore.jax.shard(qw, both, P("model", None))
    x = jax.device_put(random.standard_normal((8, 1024)).astype(np.float32), NamedSharding(both, P("data", None)))
    y = dot(x, placed)
    assert y.sharding.spec == P("data", "model"), y.sharding
    assert collectives(dot.lower(x, placed).compile()) == []
    # a stack of layers, by number
    stack = qc.quantize(jnp.asarray(np.stack([w, 2 * w])), "affine-int4-g64")
    layers = quantcore.jax.shard(stack, both, P(None, "model", None))
    some = jax.jit(quantcore.jax.layer_dot)
    assert error(some(x, layers, jnp.int32(1)), 2 * np.asarray(dot(x, qw), np.float64)) < 1e-8
    assert "all-gather" not in collectives(some.lower(np.asarray(x), layers, jnp.int32(1)).compile())
    # each device's part is whole groups and words, and decodes by itself
    np.testing.assert_array_equal(np.asarray(placed.dequantize()), np.asarray(qw.dequantize()))
    # within shard_map the parts are the user's
    from jax import shard_map
    leaves, rebuild = placed.flatten()
    mapped = shard_map(lambda x, *leaves: qc.dot(x, rebuild(leaves)), mesh=both, check_vma=False,
                       in_specs=(P("data", None), *(P("model", None),) * 3), out_specs=P("data", "model"))
    assert error(jax.jit(mapped)(x, *leaves), np.asarray(y, np.float64)) < 1e-8
    print("checked", checked)
"""

_EXPLICIT = """
    from jax.sharding import AxisType
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)
    if sys.argv[1] == "context":
        jax.set_mesh(mesh)
    checked = 0
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))
    def lies(y, *spec):
        assert jax.typeof(y).sharding.spec == P(*spec), jax.typeof(y)
        return y
    def inside(function, *spec):  # what types say inside of a trace is what is there
        return lambda *operands: lies(jax.jit(lambda *traced: lies(function(*traced), *spec))(*operands), *spec)
    for scheme in sys.argv[2:]:
        qw = qc.quantize(jnp.asarray(w), scheme)
        exact = np.asarray(qw.dequantize(), np.float64)
        for spec in (P("model", None), P(None, "model"), P("data", "model")):
            placed = quantcore.jax.shard(qw, mesh, spec)
            batch = None if "data" in spec else "data"
            assert error(inside(qc.dequantize, *spec)(placed), exact) < 1e-12
            assert error(qc.dequantize(placed), exact) < 1e-12
            indices = jnp.array([[3, 1], [0, 63]])
            assert error(inside(qc.take, None, None, spec[1])(placed, indices), exact[np.array(indices)]) < 1e-12
            for rows in (2, 40):  # by a kernel, and in tiles
                for flip in (False, True):
                    x = random.standard_normal((2, rows, 64 if flip else 1024)).astype(np.float32)
                    tensor, true = (placed.mT, x @ exact) if flip else (placed, x @ exact.T)
                    kept, summed = spec[::-1] if flip else spec
                    xd = put(x, "data", None, None)
                    dot = inside(qc.dot, batch, None, kept)
                    assert error(dot(xd, tensor), true) < 1e-8, (scheme, spec, rows, flip)
                    assert error(inside(qc.dot, None, None, kept)(put(x, None, None, "model"), tensor), true) < 1e-8
                    assert error(inside(qc.dot, None, None, kept)(x, tensor), true) < 1e-8
                    assert error(inside(qc.dot, kept)(put(x[0, 0], summed), tensor), true[0, 0]) < 1e-8
                    assert error(lies(qc.dot(xd, tensor), batch, None, kept), true) < 1e-8
                    if "data" not in spec:
                        found = collectives(jax.jit(qc.dot).lower(xd, tensor).compile())
                        assert set(found) == ({"all-reduce"} if summed else set()), found
                    if batch:
                        mapped = jax.vmap(qc.dot, (0, None))
                        assert error(inside(mapped, batch, None, kept)(xd, tensor), true) < 1e-8
                    gradient = jax.jit(jax.grad(lambda x, w: (qc.dot(x, w) ** 2).sum()))
                    back = true @ (exact.T if flip else exact) * 2
                    assert error(lies(gradient(xd, tensor), "data", None, None), back) < 1e-8
                    checked += 1
    # stacks: all of it, one layer, chosen pairs
    stack = qc.quantize(jnp.asarray(np.stack([w, 2 * w])), "affine-int4-g64")
    exact = np.asarray(stack.dequantize(), np.float64)
    layers = quantcore.jax.shard(stack, mesh, P(None, "model", None))
    x = random.standard_normal((2, 3, 1024)).astype(np.float32)
    xd, one = put(x, "data", None, None), put(x[0], None, None)
    assert error(inside(qc.dot, None, None, "model")(one, layers), x[0] @ exact.transpose(0, 2, 1)) < 1e-8
    layer = inside(lambda x, w: quantcore.jax.layer_dot(x, w, jnp.int32(1)), "data", None, "model")
    assert error(layer(xd, layers), x @ exact[1].T) < 1e-8
    left, right = jnp.array([1, 0]), jnp.array([[0], [1]])
    pairs = inside(lambda x, w: qc.gather_dot(x, w, left, right), None, None, None, "model")
    assert error(pairs(xd, layers), x[None, [1, 0]] @ exact[:, None].transpose(0, 1, 3, 2)) < 1e-8
    # what isn't divided lies as x does, and array-API code can't say how its results lie
    whole = qc.quantize(jnp.asarray(w), "affine-int4-g64")
    assert error(inside(qc.dot, "data", None, None)(xd, jax.device_put(whole, NamedSharding(mesh, P()))),
                 x @ exact[0].T) < 1e-8
    try:
        quantcore.jax.shard(qc.quantize(w, "mxfp4").to("jax"), mesh, P("model", None))
    except ValueError as problem:
        assert "mxfp4" in str(problem) and "AxisType.Auto" in str(problem), problem
        print("checked", checked)
"""

_TWO = """
    place, port = int(sys.argv[1]), sys.argv[2]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=place)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    qw = qc.quantize(w, "affine-int4-g64")
    exact = qw.dequantize().astype(np.float64)
    x = random.standard_normal((2, 1024)).astype(np.float32)
    everywhere = NamedSharding(mesh, P())
    dot = jax.jit(qc.dot, out_shardings=everywhere)
    for spec in (P("model", None), P(None, "model")):
        placed = quantcore.jax.shard(qw.to("jax"), mesh, spec)
        spread = jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])
        compiled = jax.jit(qc.dot).lower(spread, placed).compile()
        assert "all-gather" not in collectives(compiled), collectives(compiled)
        assert error(dot(spread, placed).addressable_data(0), x @ exact.T) < 1e-8
    print("done")
"""


def start(code: str, *args: str, devices: int) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_COMMON) + textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


def test_eight_devices_of_one_host() -> None:
    assert finished(start(_EIGHT, devices=8), 300).split() == ["checked", "36"]


@pytest.mark.parametrize(
    ("mesh", "schemes"),
    [
        pytest.param("context", ["affine-int4-g64", "affine-int8-row"], id="context"),
        pytest.param("operands", ["affine-int4-g64"], id="operands", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_with_explicit_axes(mesh: str, schemes: list[str]) -> None:
    """The mesh is that of the operands, and in force or not."""
    if not hasattr(jax.sharding, "auto_axes"):
        pytest.skip("this JAX has no jax.sharding.auto_axes")
    done = finished(start(_EXPLICIT, mesh, *schemes, devices=8), 300)
    assert done.split() == ["checked", str(12 * len(schemes))]


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(_TWO, str(place), port, devices=2) for place in range(2)]
    try:
        assert [finished(process, 180).split()[-1] for process in processes] == ["done", "done"]
    finally:
        for process in processes:
            process.kill()


# --- what can't be divided --------------------------------------------------------------------------------------


class FourDevices:
    """As much of a mesh as the checks look at."""

    shape = {"model": 4}  # noqa: RUF012


@pytest.mark.parametrize(
    ("shape", "scheme", "spec", "message"),
    [
        ((30, 256), "affine-int4-g64", P("model", None), "30 rows.*4 equal parts"),
        ((32, 192), "affine-int4-g64", P(None, "model"), "192 elements.*whole groups.*4 × 64"),
        ((32, 96), "affine-int3-g16", P(None, "model"), "multiple of 4 × 32"),
        ((32, 256), "affine-int4-g64", P("rows", None), "'rows'.*mesh has model"),
        ((32, 256), "affine-int4-g64", P(None, None, "model"), "names 3 axes"),
        ((4, 32, 256), "affine-int4-g64", P("model"), "leading axis"),
    ],
)
def test_parts_that_are_not_whole(shape: tuple[int, ...], scheme: str, spec: Any, message: str) -> None:
    qw = qc.quantize(jnp.zeros(shape), scheme, pad=True)
    with pytest.raises(ValueError, match=message):
        shard(qw, FourDevices(), spec)  # type: ignore[arg-type]


def test_what_is_no_weight_of_jax() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    local = qc.quantize(np.ones((4, 64), np.float32))
    with pytest.raises(TypeError, match=r"\.to\('jax'\)"):
        shard(local, mesh, P())
    with pytest.raises(TypeError, match="ndarray"):
        shard(np.ones((4, 64)), mesh, P())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PartitionSpec"):
        shard(local.to("jax"), mesh, ("model",))  # type: ignore[arg-type]
    assert shard(local.to("jax").mT, mesh, P("model", None)).shape == (64, 4)
