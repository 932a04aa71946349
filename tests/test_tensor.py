"""QuantizedTensor: what it says of itself, its views and indices, how it travels, and what it refuses to be."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcore as qc
from quantcore import QuantizedTensor, Scheme

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(20260101)
W = RNG.standard_normal((6, 128)).astype(np.float32)
STACK = RNG.standard_normal((2, 3, 6, 64)).astype(np.float32)


def half(values: Array, dtype: str) -> Array:
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def make(values: Array = W, dtype: str = "float32", **options: Any) -> QuantizedTensor:
    return qc.quantize(half(values, dtype), **{"bits": 4, "group_size": 32, **options})


def same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


# --- what it says of itself -----------------------------------------------------------------------------------


def test_attributes() -> None:
    qw = make()
    assert qw.shape == (6, 128)
    assert qw.ndim == 2
    assert qw.size == 768
    assert qw.in_features == 128
    assert qw.scheme is Scheme(bits=4, group_size=32)
    assert qw.layout == "row"
    assert qw.transposed is False
    assert qw.library == "numpy"
    assert qw.device == "cpu"
    assert qw.dtype == np.float32
    assert qw.dtype_name == "float32"
    assert qw.packed.shape == (6, 16)
    assert qw.packed.dtype == np.uint32
    assert qw.scales.shape == qw.biases.shape == (6, 4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nbytes_and_bits_per_weight_count_all_leaves(bits: int, dtype: str) -> None:
    qw = make(dtype=dtype, bits=bits)
    itemsize = 4 if dtype == "float32" else 2
    assert qw.nbytes == 6 * 128 * bits // 8 + 2 * 6 * 4 * itemsize
    assert qw.bits_per_weight == pytest.approx(bits + 2 * 8 * itemsize / 32)


def test_nbytes_in_every_library(lib: Any) -> None:
    assert make().to(lib.name).nbytes == 6 * 64 + 2 * 96


def test_bits_per_weight_of_nothing_is_zero() -> None:
    assert make()[0:0].bits_per_weight == 0.0


def test_dtype_is_the_library_s_own(lib: Any) -> None:
    assert make().to(lib.name).dtype == lib.array(W).dtype


def test_device_of_every_library(libraries: dict[str, Any]) -> None:
    assert make().to("mlx").device == "cpu"
    assert make().to("array_api_strict").device == libraries["array_api_strict"].module.Device("CPU_DEVICE")
    other = libraries["array_api_strict"].module.Device("device1")
    assert make().to("array_api_strict", other).device == other


@pytest.mark.parametrize(
    ("scales", "biases", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
        ("float16", "float32", "float32"),
        ("float64", "float64", "float32"),
    ],
)
def test_default_dtype_is_the_promotion_of_scales_and_biases(scales: str, biases: str, expected: str) -> None:
    qw = make()
    again = qc.quantized_tensor(qw.packed, half(qw.scales, scales), half(qw.biases, biases), qw.shape, qw.scheme)
    assert again.dtype_name == expected


def test_shape_follows_packed() -> None:
    qw = make(STACK)
    leaves, rebuild = qw.flatten()
    assert rebuild([leaf[0] for leaf in leaves]).shape == (3, 6, 64)
    assert rebuild([leaf[0, 0] for leaf in leaves]).mT.shape == (64, 6)


def test_repr_says_what_a_person_asks() -> None:
    text = repr(make())
    for word in (
        "QuantizedTensor",
        "(6, 128)",
        "affine-int4-g32",
        "float32",
        "numpy",
        "cpu",
        "6.00 bits/weight",
        "576",
    ):
        assert word in text
    assert "transposed" not in text
    assert "transposed" in repr(make().mT)
    assert "(128, 6)" in repr(make().mT)
    assert "mlx" in repr(make().to("mlx"))


# --- views ----------------------------------------------------------------------------------------------------


def test_mt_is_a_view_of_the_same_buffers() -> None:
    qw = make(STACK)
    view = qw.mT
    assert view.shape == (2, 3, 64, 6)
    assert view.transposed
    assert view.packed is qw.packed
    assert view.scales is qw.scales
    assert view.biases is qw.biases
    np.testing.assert_array_equal(view.dequantize(), np.swapaxes(qw.dequantize(), -1, -2))


def test_mt_twice_is_the_original_orientation() -> None:
    qw = make()
    assert qw.mT.mT.shape == qw.shape
    assert qw.mT.mT.annotation is qw.annotation
    assert qw.mT.mT is not qw


def test_t_is_for_two_axes() -> None:
    assert make().T.shape == (128, 6)
    with pytest.raises(ValueError, match=r"2 axes, not 4 .*\(2, 3, 6, 64\).*mT"):
        _ = make(STACK).T


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_astype_changes_the_dtype_and_no_buffer(dtype: str) -> None:
    qw = make()
    cast = qw.astype(dtype)
    assert cast.dtype_name == dtype
    assert cast.packed is qw.packed
    assert cast.scales is qw.scales
    assert cast.biases is qw.biases
    assert cast.scales.dtype == np.float32
    same_bits(cast.dequantize(), half(qw.dequantize(), dtype))


def test_astype_takes_dtype_objects_of_the_library(libraries: dict[str, Any]) -> None:
    mx = libraries["mlx"].module
    assert make().astype(np.float16).dtype == np.float16
    assert make().astype(ml_dtypes.bfloat16).dtype == np.dtype(ml_dtypes.bfloat16)
    assert make().to("mlx").astype(mx.bfloat16).dtype == mx.bfloat16
    assert make().mT.astype("float16").transposed


@pytest.mark.parametrize("dtype", ["float64", "int8", "complex64", np.uint32, bool])
def test_astype_refuses_what_it_cannot_dequantize_to(dtype: Any) -> None:
    with pytest.raises(TypeError, match="float16, bfloat16, float32"):
        make().astype(dtype)


def test_canonical_of_the_canonical_layout_is_itself() -> None:
    qw = make()
    assert qw.canonical() is qw
    assert qc.prepack(qw).canonical().layout == "row"


def test_dequantize_method_is_the_function() -> None:
    qw = make()
    same_bits(qw.dequantize(), qc.dequantize(qw))
    same_bits(qw.dequantize(dtype="float16"), qc.dequantize(qw).astype(np.float16))


# --- leaves ---------------------------------------------------------------------------------------------------


def test_flatten_gives_the_buffers_and_rebuild_the_tensor(lib: Any) -> None:
    qw = make(STACK, bits=3).mT.astype("float16").to(lib.name)
    leaves, rebuild = qw.flatten()
    assert len(leaves) == 3
    assert leaves[0] is qw.packed
    assert leaves[1] is qw.scales
    assert leaves[2] is qw.biases
    again = rebuild(leaves)
    assert again.annotation is qw.annotation
    assert again.in_features == qw.in_features
    assert again.packed is qw.packed


def test_rebuild_never_validates() -> None:
    _, rebuild = make().flatten()
    leaves = [object(), object(), object()]
    odd = rebuild(leaves)
    assert odd.flatten()[0] == tuple(leaves)
    assert odd.scheme is Scheme(bits=4, group_size=32)
    assert odd.mT.transposed
    assert odd.mT.flatten()[0] == tuple(leaves)
    assert "object" in repr(odd)
    assert copy.copy(odd).packed is leaves[0]


def test_rebuild_from_two_leaves_has_no_biases() -> None:
    _, rebuild = make().flatten()
    odd = rebuild([object(), object()])
    assert odd.biases is None
    assert len(odd.flatten()[0]) == 2


def test_rebuild_from_shape_structs() -> None:
    leaves, rebuild = make(STACK).flatten()
    structs = [SimpleNamespace(shape=leaf.shape[1:], dtype=leaf.dtype) for leaf in leaves]
    odd = rebuild(structs)
    assert odd.shape == (3, 6, 64)
    assert odd.ndim == 3
    assert odd.mT.shape == (3, 64, 6)
    assert odd.size == 3 * 6 * 64
    assert "affine-int4-g32" in repr(odd)


# --- indexing -------------------------------------------------------------------------------------------------

GOOD = [
    np.s_[0],
    np.s_[-1],
    np.s_[1, 2],
    np.s_[:],
    np.s_[...],
    np.s_[0:1],
    np.s_[:, 1],
    np.s_[:, -3:],
    np.s_[::-1, ::2],
    np.s_[..., 1:4, :],
    np.s_[..., ::-2, :],
    np.s_[1, ..., 2:3, :],
    np.s_[..., :],
    np.s_[..., 0:64],
    np.s_[0, 0, 2:5],
    np.s_[0, :, 1:3, :],
    np.s_[np.int64(1)],
    np.s_[1:1],
    np.s_[..., 3:3, :],
    np.s_[()],
]


@pytest.mark.parametrize("index", GOOD, ids=str)
def test_indexing_commutes_with_dequantize(lib: Any, index: Any) -> None:
    qw = make(STACK, bits=3).to(lib.name)
    dense = make(STACK, bits=3).dequantize()
    found = qw[index]
    assert isinstance(found, QuantizedTensor)
    assert found.shape == dense[index].shape
    same_bits(lib.numpy(found.dequantize()), np.ascontiguousarray(dense[index]))


@pytest.mark.parametrize("index", [np.s_[1], np.s_[..., :, 2:5], np.s_[:, 0, :, ::-1], np.s_[0, 0, ..., 1:2]], ids=str)
def test_indexing_a_transposed_tensor_slices_its_last_axis(lib: Any, index: Any) -> None:
    qw = make(STACK).mT.to(lib.name)
    dense = make(STACK).mT.dequantize()
    assert qw[index].transposed
    same_bits(lib.numpy(qw[index].dequantize()), np.ascontiguousarray(dense[index]))


def test_an_indexed_tensor_still_multiplies(close: Any) -> None:
    qw = make(STACK)
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    close(qc.dot(x, qw[1, 0, ::-2]), x @ qw.dequantize()[1, 0, ::-2].T)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (np.s_[0, 0, 0], IndexError, ["fewer than 2 axes", "(2, 3, 6, 64)", "take"]),
        (np.s_[..., 0], IndexError, ["fewer than 2 axes", "take"]),
        (np.s_[..., 0, :], IndexError, ["fewer than 2 axes", "take"]),
        (np.s_[..., 0:32], IndexError, ["grouped axis -1", "(2, 3, 6, 64)", "dequantize"]),
        (np.s_[..., ::-1], IndexError, ["grouped axis -1", "dequantize"]),
        (np.s_[..., 1:], IndexError, ["grouped axis -1"]),
        (np.s_[2], IndexError, ["2", "axis 0", "length 2"]),
        (np.s_[0, -4], IndexError, ["-4", "axis 1", "length 3"]),
        (np.s_[0, 0, :, :, :], IndexError, ["5 indices", "4 axes"]),
        (np.s_[..., 0, ...], IndexError, ["one ellipsis"]),
        (np.s_[None], TypeError, ["ints and slices", "NoneType"]),
        (np.s_[True], TypeError, ["ints and slices", "bool"]),
        (np.s_[[0, 1]], TypeError, ["ints and slices", "list", "take"]),
        (np.s_[np.asarray([0, 1])], TypeError, ["ints and slices", "take"]),
        (np.s_["a"], TypeError, ["ints and slices", "str"]),
        (np.s_[1.0], TypeError, ["ints and slices", "float"]),
    ],
    ids=str,
)
def test_indices_that_are_refused(index: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        make(STACK)[index]
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


def test_grouped_axis_of_a_transposed_tensor_is_minus_two() -> None:
    with pytest.raises(IndexError, match=r"grouped axis -2 .*\(2, 3, 64, 6\)"):
        make(STACK).mT[..., 0:32, :]
    with pytest.raises(IndexError, match="fewer than 2 axes"):
        make(STACK).mT[..., 0]


# --- what it is not -------------------------------------------------------------------------------------------


def test_equality_and_hash_are_identity() -> None:
    a, b = make(), make()
    assert a == a
    assert a != b
    assert (a == W) is False
    assert (a == 3) is False
    assert hash(a) != hash(b)
    assert len({a, b, a}) == 2
    assert {a: "a", b: "b"}[b] == "b"


@pytest.mark.parametrize(
    "use",
    [
        bool,
        len,
        iter,
        list,
        float,
        int,
        lambda qw: 3 in qw,
        lambda qw: 1 if qw else 0,
        lambda qw: [*qw],
        lambda qw: sum(qw),
    ],
    ids=["bool", "len", "iter", "list", "float", "int", "in", "if", "star", "sum"],
)
def test_it_is_no_container_and_no_number(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        use(make())


@pytest.mark.parametrize("use", [bool, len, iter, lambda qw: 3 in qw], ids=["bool", "len", "iter", "in"])
def test_the_refusal_says_to_dequantize(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"not an array.*dequantize"):
        use(make())


@pytest.mark.parametrize("convert", [np.asarray, np.array, lambda qw: np.asarray(qw, dtype=np.float32)])
def test_numpy_does_not_convert_it(convert: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="dequantize"):
        convert(make())


def test_it_has_no_array_namespace() -> None:
    assert not hasattr(make(), "__array_namespace__")
    assert not hasattr(make(), "__dlpack__")


@pytest.mark.parametrize("name", ["packed", "scales", "biases", "in_features", "annotation", "shape", "scheme", "new"])
def test_immutable(name: str) -> None:
    qw = make()
    with pytest.raises(AttributeError, match="immutable"):
        setattr(qw, name, None)
    with pytest.raises(AttributeError, match="immutable"):
        delattr(qw, name)
    assert qw.shape == (6, 128)


def test_items_cannot_be_assigned() -> None:
    with pytest.raises(TypeError):
        make()[0:1] = 0  # type: ignore[index]


def test_weakref() -> None:
    qw = make()
    reference = weakref.ref(qw)
    assert reference() is qw
    del qw
    assert reference() is None


def test_is_quantized() -> None:
    assert qc.is_quantized(make())
    assert not qc.is_quantized(W)
    assert not qc.is_quantized(None)


# --- copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "mlx"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "again", [lambda q: pickle.loads(pickle.dumps(q)), copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"]
)
def test_copies_are_bit_equal(library: str, dtype: str, again: Any, libraries: dict[str, Any]) -> None:
    qw = make(STACK, dtype=dtype, bits=5).mT.to(library)
    made = again(qw)
    assert made is not qw
    assert made.annotation is qw.annotation
    assert made.shape == qw.shape
    assert made.library == library
    lib = libraries[library]
    for ours, theirs in zip(made.flatten()[0], qw.flatten()[0], strict=True):
        same_bits(lib.numpy(ours), lib.numpy(theirs))
    same_bits(lib.numpy(made.dequantize()), lib.numpy(qw.dequantize()))


def test_copy_shares_and_deepcopy_does_not() -> None:
    qw = make()
    assert copy.copy(qw).packed is qw.packed
    deep = copy.deepcopy(qw)
    assert deep.scheme is qw.scheme
    assert not np.shares_memory(deep.packed, qw.packed)


def test_a_padded_tensor_keeps_its_logical_size_through_pickle() -> None:
    qw = qc.quantize(W[:, :100], group_size=64, pad=True)
    again = pickle.loads(pickle.dumps(qw))
    assert again.shape == (6, 100)
    same_bits(again.dequantize(), qw.dequantize())


# --- products in NumPy's own words ----------------------------------------------------------------------------

X = RNG.standard_normal((3, 128)).astype(np.float32)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, qw: x @ qw.mT,
        lambda x, qw: x @ qw.T,
        lambda x, qw: np.matmul(x, qw.mT),
        lambda x, qw: np.linalg.matmul(x, qw.mT),
        lambda x, qw: np.dot(x, qw.mT),
        lambda x, qw: np.tensordot(x, qw, axes=([1], [1])),
        lambda x, qw: np.tensordot(x, qw.mT, axes=1),
        lambda x, qw: np.tensordot(x, qw.mT, 1),
        lambda x, qw: np.linalg.tensordot(x, qw.mT, axes=1),
        lambda x, qw: np.matmul(x, np.matrix_transpose(qw)),
        lambda x, qw: (qw @ x.T).T,
        lambda x, qw: np.matmul(qw, x.T).T,
        lambda x, qw: np.dot(qw, x.T).T,
        lambda x, qw: np.stack([np.dot(qw, row) for row in x]),
        lambda x, qw: np.stack([row @ qw.mT for row in x]),
    ],
)
def test_products_in_numpy_s_words(product: Callable[[Array, QuantizedTensor], Array], close: Any) -> None:
    qw = make()
    close(product(X, qw), X @ qw.dequantize().T)


def test_the_in_place_operator_makes_a_new_array() -> None:
    qw = qc.quantize(RNG.standard_normal((128, 128)).astype(np.float32))
    x = X.copy()
    with pytest.raises(TypeError):
        x @= qw.mT  # NumPy asks for out=, which nothing here writes to
    np.testing.assert_array_equal(x, X)


def test_numpy_dot_of_more_axes_is_another_product() -> None:
    with pytest.raises(TypeError, match=r"numpy\.dot.*quantcore\.matmul"):
        np.dot(X, make(STACK).mT)
    with pytest.raises(TypeError, match=r"numpy\.dot"):
        np.dot(make(), np.ones((2, 128, 3), np.float32))


def test_numpy_take_of_rows() -> None:
    qw = make()
    same_bits(np.take(qw, [5, 0, -1], axis=0), qw.dequantize()[[5, 0, -1]])
    same_bits(np.take(qw, np.asarray([[1], [2]]), 0), qw.dequantize()[[[1], [2]]])


def test_numpy_take_without_an_axis_would_flatten() -> None:
    with pytest.raises(ValueError, match=r"numpy\.take.*axis.*dequantize"):
        np.take(make(), [0])


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda qw: np.add(X, qw), "numpy.add"),
        (lambda qw: X + qw, "numpy.add"),
        (lambda qw: qw + X, "numpy.add"),
        (lambda qw: X * qw, "numpy.multiply"),
        (lambda qw: np.exp(qw), "numpy.exp"),
        (lambda qw: operator.eq(X, qw), "numpy.equal"),
        (lambda qw: np.add.reduce(qw), "numpy.add"),
        (lambda qw: np.matmul(X, qw.mT, out=np.empty((3, 6), np.float32)), "out"),
        (lambda qw: np.sum(qw), "numpy.sum"),
        (lambda qw: np.concatenate([qw, qw]), "numpy.concatenate"),
        (lambda qw: np.einsum("ij,kj->ik", X, qw), "numpy.einsum"),
        (lambda qw: np.transpose(qw), "numpy.transpose"),
        (lambda qw: np.reshape(qw, (-1,)), "numpy.reshape"),
        (lambda qw: np.linalg.norm(qw), "numpy.norm"),
        (lambda qw: np.where(True, qw, 0), "numpy.where"),
        (lambda qw: np.array_equal(qw, qw), "numpy.array_equal"),
        (lambda qw: np.swapaxes(qw, 0, 1), "numpy.swapaxes"),
    ],
)
def test_other_numpy_functions_say_to_dequantize(use: Callable[[QuantizedTensor], Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{re.escape(name)}.*dequantize"):
        use(make())


def test_other_libraries_own_operators_refuse_it(libraries: dict[str, Any]) -> None:
    for name in ("mlx", "array_api_strict"):
        x = libraries[name].array(X)
        qw = make().to(name)
        with pytest.raises(TypeError):
            x @ qw.mT
        np.testing.assert_allclose(
            libraries[name].numpy(qc.matmul(x, qw.mT)), X @ make().dequantize().T, rtol=1e-5, atol=1e-4
        )


def test_torch_s_protocol_is_there_without_torch(close: Any) -> None:
    answer = QuantizedTensor.__torch_function__
    close(answer(SimpleNamespace(__name__="linear"), (), (X, make())), X @ make().dequantize().T)
    close(
        answer(SimpleNamespace(__name__="linear"), (), (X, make()), {"bias": np.ones(6, np.float32)}),
        X @ make().dequantize().T + 1,
    )
    close(answer(SimpleNamespace(__name__="matmul"), (), (X, make().mT)), X @ make().dequantize().T)
    close(answer(SimpleNamespace(__name__="embedding"), (), (np.asarray([2, 1]), make())), make().dequantize()[[2, 1]])
    with pytest.raises(TypeError, match=r"torch relu.*dequantize"):
        answer(SimpleNamespace(__name__="relu"), (), (make(),))


# --- between libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", [("mlx",), ("array_api_strict",), ("mlx", "array_api_strict"), ("mlx", "mlx")], ids=str)
def test_round_trip_through_libraries_is_bit_equal(dtype: str, way: tuple[str, ...]) -> None:
    qw = qc.quantize(half(STACK, dtype)[..., :50], bits=5, group_size=32, pad=True).mT
    moved = qw
    if "array_api_strict" in way and dtype != "float32":
        with pytest.raises(TypeError, match=f"array_api_strict.*{dtype}"):  # it has no such dtype
            functools.reduce(QuantizedTensor.to, way, qw)
        return
    for library in way:
        moved = moved.to(library)
        assert moved.library == library
    back = moved.to("numpy")
    assert back.annotation is qw.annotation
    assert back.shape == qw.shape
    for ours, theirs in zip(back.flatten()[0], qw.flatten()[0], strict=True):
        same_bits(ours, theirs)


def test_logical_dtype_crosses_even_where_the_scales_are_wider() -> None:
    moved = make().astype("bfloat16").to("mlx")
    assert moved.dtype_name == "bfloat16"
    assert str(moved.scales.dtype).endswith("float32")


def test_moving_to_where_it_is_moves_nothing(lib: Any) -> None:
    qw = make().to(lib.name)
    again = qw.to(lib.name)
    assert again.packed is qw.packed
    assert again.scales is qw.scales


def test_memory_is_shared_where_it_can_be(libraries: dict[str, Any]) -> None:
    qw = make()
    strict = qw.to("array_api_strict")
    assert np.shares_memory(np.from_dlpack(strict.packed), qw.packed)
    assert np.shares_memory(strict.to("numpy").packed, qw.packed)
    mlx = qw.to("mlx")
    assert np.shares_memory(mlx.to("numpy").packed, np.asarray(mlx.packed))
    mx = libraries["mlx"].module
    halved = make(dtype="bfloat16").to("mlx")
    assert halved.scales.dtype == mx.bfloat16
    assert halved.to("numpy").scales.dtype == np.dtype(ml_dtypes.bfloat16)


def test_read_only_and_byte_swapped_buffers_move(libraries: dict[str, Any]) -> None:
    qw = make()
    leaves, rebuild = qw.flatten()
    frozen = [leaf.copy() for leaf in leaves]
    for leaf in frozen:
        leaf.flags.writeable = False
    swapped = [leaf.astype(leaf.dtype.newbyteorder()) for leaf in leaves]
    for odd in (rebuild(frozen), rebuild(swapped)):
        moved = odd.to("mlx")
        same_bits(libraries["mlx"].numpy(moved.packed), qw.packed)
        same_bits(libraries["mlx"].numpy(moved.scales), qw.scales)


def test_from_one_device_to_another(libraries: dict[str, Any]) -> None:
    strict = libraries["array_api_strict"].module
    there = make().to("array_api_strict", strict.Device("device1"))
    assert there.device == strict.Device("device1")
    assert there.to("array_api_strict").device == strict.Device("device1")
    assert there.to("array_api_strict", strict.Device("CPU_DEVICE")).device == strict.Device("CPU_DEVICE")
    same_bits(there.to("numpy").packed, make().packed)
    dense = there.dequantize()
    assert dense.device == strict.Device("device1")


def test_to_library_moves_one_array(lib: Any) -> None:
    moved = qc.to_library(X, lib.name)
    assert isinstance(moved, lib.array_type)
    same_bits(lib.numpy(moved), X)
    same_bits(qc.to_library(moved, "numpy"), X)
