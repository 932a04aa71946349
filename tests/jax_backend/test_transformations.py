"""A QuantizedTensor under JAX's transformations, against float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import quantcore as qc


def test_it_is_a_pytree(case: Any) -> None:
    qw = case().qw.mT.astype("bfloat16")
    leaves, tree = jax.tree.flatten(qw)
    assert [leaf is part for leaf, part in zip(leaves, qw.flatten()[0], strict=True)] == [True] * 3
    back = jax.tree.unflatten(tree, leaves)
    assert (back.scheme, back.shape, back.dtype_name, back.transposed) == (
        qw.scheme,
        qw.shape,
        "bfloat16",
        True,
    )
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(qw)]
    assert paths == [".packed", ".scales", ".biases"]
    assert jax.tree.structure(qw) == jax.tree.structure(qw.mT.mT)
    assert jax.tree.structure(qw) != jax.tree.structure(qw.mT)
    assert jax.tree.map(lambda leaf: leaf.shape, qw).packed == (24, 16)


def test_it_passes_through_jit_unchanged(case: Any) -> None:
    qw = case().qw
    out = jax.jit(lambda tensor: tensor.mT)(qw)
    assert isinstance(out, qc.QuantizedTensor)
    assert out.shape == (128, 24)
    np.testing.assert_array_equal(out.packed, qw.packed)


def test_the_repr_inside_a_trace_is_readable(case: Any) -> None:
    shown: list[str] = []
    jax.jit(lambda tensor: shown.append(repr(tensor)))(case().qw)
    assert "affine-int4-g64" in shown[0]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("scheme", ["affine-int4-g64", "affine-int3-g16", "affine-int8-row"])
def test_jit_and_grad(case: Any, close: Any, scheme: str, rows: int) -> None:
    it = case(scheme=scheme, rows=rows)
    close(jax.jit(qc.dot)(it.x, it.qw), it.xs @ it.exact.T)
    close(jax.jit(lambda x, w: x @ w.mT)(it.x, it.qw), it.xs @ it.exact.T)

    def loss(x: Any, w: Any) -> Any:
        return (qc.dot(x, w) ** 2).sum()

    wanted = 2 * it.xs @ it.exact.T @ it.exact
    close(jax.grad(loss)(it.x, it.qw), wanted)
    close(jax.jit(jax.grad(loss))(it.x, it.qw), wanted)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(it.x, it.qw), wanted)


def test_forward_and_higher_derivatives(case: Any, close: Any) -> None:
    it = case()

    def f(x: Any) -> Any:
        return qc.dot(x, it.qw)

    tangent = jnp.ones_like(it.x)
    _, moved = jax.jvp(f, (it.x,), (tangent,))
    close(moved, np.ones_like(it.xs) @ it.exact.T)
    _, linear = jax.linearize(f, it.x)
    close(linear(tangent), np.ones_like(it.xs) @ it.exact.T)
    hessian = jax.jit(jax.hessian(lambda v: (f(v) ** 2).sum()))(it.x[0])
    close(hessian, 2 * it.exact.T @ it.exact)


def test_the_gradient_of_the_weight_is_refused_by_name(case: Any) -> None:
    it = case()

    def loss(scales: Any) -> Any:
        packed, _, biases = it.qw.flatten()[0]
        return qc.dot(it.x, qc.quantized_tensor(packed, scales, biases, it.qw.shape, it.qw.scheme)).sum()

    with pytest.raises(NotImplementedError, match="quantized weight"):
        jax.grad(loss)(it.qw.scales)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inside_jit(case: Any, close: Any, dtype: str) -> None:
    it = case()
    qw = qc.quantize(it.w.astype(dtype), "affine-int4-g64")
    x = it.x.astype(dtype)
    out = jax.jit(qc.dot)(x, qw)
    assert out.dtype == dtype
    exact = np.asarray(x, np.float64) @ np.asarray(qw.dequantize(dtype="float32"), np.float64).T
    close(out, exact, 1e-4 if dtype == "bfloat16" else 1e-6)
    gradient = jax.jit(jax.grad(lambda x: qc.dot(x, qw).astype(jnp.float32).sum()))(x)
    assert gradient.dtype == dtype


def test_vmap_over_x_over_weights_and_over_both(case: Any, close: Any) -> None:
    it = case(shape=(4, 24, 128), rows=4)
    one = qc.quantize(it.w[0], "affine-int4-g64")
    close(jax.vmap(lambda x: qc.dot(x, one))(it.x), it.xs @ it.exact[0].T)
    every = np.einsum("mk,enk->emn", it.xs, it.exact)
    close(jax.vmap(qc.dot, in_axes=(None, 0))(it.x, it.qw), every)
    close(jax.jit(jax.vmap(qc.dot))(it.x, it.qw), np.einsum("ek,enk->en", it.xs, it.exact))
    nested = jax.vmap(jax.vmap(qc.dot, in_axes=(0, None)), in_axes=(None, 0))(it.x, it.qw)
    close(nested, every)
    gradients = jax.vmap(jax.grad(lambda x, w: qc.dot(x, w).sum()), in_axes=(0, 0))(it.x, it.qw)
    close(gradients, it.exact.sum(1))
    close(lax.map(lambda pair: qc.dot(*pair), (it.x, it.qw)), np.einsum("ek,enk->en", it.xs, it.exact))


def test_gather_dot_with_traced_indices(case: Any, close: Any) -> None:
    it = case(shape=(4, 24, 128))
    rhs = jnp.asarray([3, 0, 9, -1])
    x = jnp.broadcast_to(it.x[:, None], (3, 1, 128))
    lhs = jnp.asarray([0, 1, 1, 2])
    out = np.asarray(jax.jit(qc.gather_dot)(x, it.qw, lhs, rhs))
    wanted = np.stack([it.xs[[i]] @ it.exact[j].T for i, j in ((0, 3), (1, 0), (2, 3))])
    close(out[[0, 1, 3]], wanted)
    assert np.isnan(out[2]).all()


def test_layers_in_a_scan(case: Any, close: Any) -> None:
    from quantcore_backends.jax_backend.door import layer_dot

    it = case(shape=(5, 128, 128), rows=2)

    def through(x: Any, stack: Any) -> Any:
        return lax.scan(lambda h, i: (jnp.tanh(0.1 * layer_dot(h, stack, i)), None), x, jnp.arange(5))[0]

    wanted = it.xs
    for layer in it.exact:
        wanted = np.tanh(0.1 * wanted @ layer.T)
    close(jax.jit(through)(it.x, it.qw), wanted, 5e-8)
    by_slices = jax.jit(lambda x, stack: lax.scan(lambda h, w: (jnp.tanh(0.1 * qc.dot(h, w)), None), x, stack)[0])
    close(by_slices(it.x, it.qw), wanted, 5e-8)
    gradient = jax.jit(jax.grad(lambda x: through(x, it.qw).sum()))(it.x)
    step = 1e-6
    numeric = np.zeros_like(it.xs)
    for place in [(0, 3), (1, 100)]:
        moved = [it.xs.copy(), it.xs.copy()]
        for sign, start in zip((1, -1), moved, strict=True):
            start[place] += sign * step
        ends = []
        for h in moved:
            for layer in it.exact:
                h = np.tanh(0.1 * h @ layer.T)
            ends.append(h.sum())
        numeric[place] = (ends[0] - ends[1]) / (2 * step)
        assert gradient[place] == pytest.approx(numeric[place], rel=1e-4, abs=1e-4)


def test_quantize_and_dot_in_one_trace(case: Any, close: Any) -> None:
    it = case()
    close(jax.jit(lambda x, w: qc.dot(x, qc.quantize(w, "affine-int4-g64")))(it.x, it.w), it.xs @ it.exact.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", ["affine-int4-g64", "affine-int1-g32", "affine-int5-g16", "affine-int8-row"])
def test_quantize_gives_the_same_bits_inside_jit_as_outside(scheme: str, dtype: Any) -> None:
    w = np.random.default_rng(1).standard_normal((40, 256)).astype(dtype)
    local = qc.quantize(w, scheme)
    for made in (qc.quantize(jnp.asarray(w), scheme), jax.jit(qc.quantize, static_argnums=1)(jnp.asarray(w), scheme)):
        for name in ("packed", "scales", "biases"):
            np.testing.assert_array_equal(np.asarray(getattr(made, name)), getattr(local, name))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_concrete_weights_decode_bit_for_bit(case: Any, dtype: str) -> None:
    qw = case(scheme="affine-int3-g32").qw
    wanted = qw.to("numpy").dequantize(dtype=dtype)
    np.testing.assert_array_equal(np.asarray(qw.dequantize(dtype=dtype)), wanted)
    np.testing.assert_array_equal(np.asarray(qc.take(qw, jnp.asarray([3, 1]), out_dtype=dtype)), wanted[[3, 1]])


def test_nothing_is_traced_twice(case: Any) -> None:
    traces = 0

    def f(x: Any, w: Any) -> Any:
        nonlocal traces
        traces += 1
        return qc.dot(x, w)

    compiled = jax.jit(f)
    first, second = case(), case()
    other = qc.quantize(second.w * 2, qc.Scheme(bits=4, group_size=64))
    for weight in (first.qw, second.qw, other, pickle.loads(pickle.dumps(first.qw)), copy.deepcopy(first.qw)):
        compiled(first.x, weight)
    assert traces == 1
    compiled(first.x, case(scheme="affine-int4-g32").qw)
    assert traces == 2


def test_shapes_without_arrays(case: Any) -> None:
    it = case()
    shape = jax.eval_shape(lambda w: qc.quantize(w, "affine-int4-g64"), it.w)
    assert isinstance(shape, qc.QuantizedTensor)
    assert shape.shape == (24, 128)
    assert jax.eval_shape(qc.dot, it.x, shape).shape == (3, 24)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation(case: Any, close: Any) -> None:
    it = case()
    x = it.x + 0
    weight = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(0), it.qw)
    moved, out = jax.jit(lambda x, w: (jax.tree.map(lambda a: a, w), qc.dot(x, w)), donate_argnums=1)(x, weight)
    close(out, it.xs @ it.exact.T)
    assert weight.packed.is_deleted()
    close(qc.dot(x, moved), it.xs @ it.exact.T)


@pytest.mark.parametrize("shapes", [((0, 128), (24, 128)), ((3, 128), (0, 128)), ((0, 3, 128), (0, 24, 128))])
def test_empty_operands_inside_jit(shapes: Any) -> None:
    x = jnp.zeros(shapes[0])
    qw = qc.quantize(jnp.zeros(shapes[1]), "affine-int4-g64")
    out = jax.jit(qc.dot)(x, qw)
    assert out.shape == (*shapes[0][:-1], shapes[1][-2])
    assert jax.grad(lambda x: qc.dot(x, qw).sum())(x).shape == x.shape


def test_float64_needs_64_bit_types(case: Any) -> None:
    it = case()
    with pytest.raises(qc.UnsupportedError, match="jax_enable_x64"):
        qc.to_library(np.zeros(3), "jax")
    with pytest.raises(qc.UnsupportedError, match="jax_enable_x64"):
        qc.dot(it.x, it.qw, out_dtype="float64")
    with jax.enable_x64(True):
        x = jnp.asarray(it.xs)
        out = jax.jit(qc.dot)(x, it.qw)
        assert out.dtype == np.float64
        np.testing.assert_allclose(np.asarray(out), it.xs @ it.exact.T, rtol=1e-9, atol=1e-9)
