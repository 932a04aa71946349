"""What the conformance kit runs on: schemes, weights, activations and shape classes, all from fixed seeds."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import cycle
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from quantcore.scheme import Scheme
from quantcore.testing import oracle

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "FEW_SCHEMES",
    "MICROSCALED",
    "PAIRS",
    "SCHEMES",
    "SHAPES",
    "ShapeClass",
    "Weight",
    "activations",
    "exact_codes",
    "groups_to_encode",
    "random_weight",
    "rng",
]

Array: TypeAlias = np.ndarray[Any, Any]

DTYPES: Final = ("float32", "float16", "bfloat16")
_BITS: Final = (1, 2, 3, 4, 5, 6, 8)
_GROUPS: Final = (16, 32, 64, 128, 256, None)

SCHEMES: Final = tuple(Scheme("affine", bits, group) for bits in _BITS for group in _GROUPS)

FEW_SCHEMES: Final = tuple(
    Scheme("affine", bits, group)
    for bits, group in ((4, 64), (8, 32), (3, 128), (1, 64), (5, 16), (2, 256), (6, None), (4, None))
)
"""Every code width, every group size, and each of the commonest pairs; for what isn't run on every scheme."""

MICROSCALED: Final = tuple(Scheme(mode) for mode in ("mxfp4", "mxfp8", "nvfp4"))
"""Schemes whose elements and scales are small floats."""

PAIRS: Final = tuple(
    (scheme, x_dtype, w_dtype)
    for bits in _BITS
    for scheme, (x_dtype, w_dtype) in zip(
        cycle([Scheme("affine", bits, group) for group in (64, 16, 32, 128, None, 256, 32)]),
        [(x, w) for x in (*DTYPES, "float64") for w in DTYPES if x != w],
        strict=False,
    )
)
"""Every pair of unequal dtypes of x and w with every code width, the group sizes taking turns."""


def rng(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


# --- weights --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight as NumPy arrays, with what it stands for.

    Attributes
    ----------
    packed, scales : array
    biases : array or None
    scheme : Scheme
    columns : int
        Logical length of the grouped axis.
    dtype : str
        Logical dtype.
    transposed : bool
        Whether it is used as its `.mT`.
    """

    packed: Array
    scales: Array
    biases: Array | None
    scheme: Scheme
    columns: int
    dtype: str
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape with the grouped axis last."""
        return (*self.scales.shape[:-1], self.columns)

    @property
    def leaves(self) -> tuple[Array, ...]:
        """The arrays: packed, scales and, where there are any, biases."""
        return (self.packed, self.scales) if self.biases is None else (self.packed, self.scales, self.biases)

    @property
    def mT(self) -> "Weight":  # noqa: N802 (the array API's name)
        """The same arrays, used the other way round."""
        flipped = replace(self, transposed=not self.transposed)
        if "exact" in vars(self):
            vars(flipped)["exact"] = np.swapaxes(self.exact, -1, -2)
        return flipped

    @cached_property
    def exact(self) -> Array:
        """The weight in float64, in the orientation in which it is used."""
        return self._oriented(oracle.exact_weight(self.packed, self.scales, self.biases, self.scheme, self.columns))

    def dense(self, dtype: str | None = None) -> Array:
        """The contract's dense weight, in the orientation in which it is used."""
        name = self.dtype if dtype is None else dtype
        return self._oriented(oracle.dequantize(self.packed, self.scales, self.biases, self.scheme, self.columns, name))

    def _oriented(self, dense: Array) -> Array:
        return np.swapaxes(dense, -1, -2) if self.transposed else dense


@lru_cache(maxsize=8)
def random_weight(scheme: Scheme, shape: tuple[int, ...], dtype: str, leaf_dtype: str | None = None) -> Weight:
    """A weight of elements of about unit size, with scales of either sign.

    Parameters
    ----------
    scheme : Scheme
    shape : tuple of int
        Stored shape (..., N, K).
    dtype : str
        Logical dtype.
    leaf_dtype : str, optional
        Dtype of scales and biases; by default `dtype`.
    """
    random = rng("weight", str(scheme), shape, dtype)
    codes = random.integers(0, 2**scheme.bits, shape)
    if scheme.mode != "affine":
        return _random_microscaled(random, codes, scheme, dtype)
    top = 2**scheme.bits - 1
    groups = (*shape[:-1], 1 if scheme.group_size is None else -(-shape[-1] // scheme.group_size))
    scales = random.uniform(1, 3, groups) / top * random.choice([-1, 1], groups)
    biases = -scales * top / 2 + random.normal(0, 0.1, groups)
    kind = oracle.numpy_dtype(leaf_dtype or dtype)
    packed = oracle.pack_codes(codes, scheme.bits)
    return Weight(packed, scales.astype(kind), biases.astype(kind), scheme, shape[-1], dtype)


def _random_microscaled(random: np.random.Generator, codes: Array, scheme: Scheme, dtype: str) -> Weight:
    elements, _ = oracle.MICROSCALED[scheme.mode]
    codes = np.where(np.isnan(elements[codes]), 0, codes)
    around = 127 if scheme.mode != "nvfp4" else 0x38
    scales = random.integers(around - 6, around + 6, (*codes.shape[:-1], scheme.groups(codes.shape[-1])))
    if scheme.mode == "mxfp8":
        scales = scales - 8  # elements reach 448
    return Weight(oracle.pack_codes(codes, scheme.bits), scales.astype(np.uint8), None, scheme, codes.shape[-1], dtype)


def exact_codes(scheme: Scheme, shape: tuple[int, ...], dtype: str) -> Weight:
    """An affine weight whose elements, zeros among them, are small integers: exact however they are computed."""
    random = rng("exact", str(scheme), shape)
    weight = random_weight(scheme, shape, dtype)
    scales = random.choice([-2.0, -1.0, 1.0, 2.0], weight.scales.shape)
    middle = random.integers(0, 2**scheme.bits, weight.scales.shape)
    kind = oracle.numpy_dtype("float32" if scheme.bits == 8 and dtype != "float32" else dtype)
    return replace(weight, scales=scales.astype(kind), biases=(-scales * middle).astype(kind))


def groups_to_encode(bits: int, group: int, dtype: str) -> Mapping[str, Array]:
    """Groups on which encoders differ, each as rows of `dtype`, by what they are.

    Parameters
    ----------
    bits, group : int
    dtype : str

    Returns
    -------
    mapping of str to array, shape (R, group)
    """
    random = rng("groups", bits, group)
    normal = random.standard_normal((6, group))
    top = 2**bits - 1
    ramp = np.minimum(np.arange(group) % (top + 1) + 0.5, top)
    ramp[0] = 0
    largest = {"float16": 3e4, "bfloat16": 1.6e38, "float32": 1.6e38}[dtype]
    smallest = 2.0**-24 if dtype == "float16" else 1e-40
    zeros = np.zeros((1, group))
    mostly = np.where(random.random((2, group)) < 0.1, normal[:2], 0.0)
    kinds = {
        "random": normal,
        "wide": normal * 10.0 ** random.uniform(-4, 3, (6, 1)),
        "all-negative": -np.abs(normal) - 0.25,
        "all-positive": np.abs(normal) + 0.25,
        "constant": np.repeat([[2.5], [-0.3], [1e-3], [-1e-3]], group, axis=1),
        "all-zero": np.concatenate([zeros, -zeros]),
        "mostly zero": np.concatenate([mostly, -np.abs(mostly), np.abs(mostly)]),
        "huge": np.clip(normal / 3, -1, 1) * largest,
        "tiny": normal * 1e-7,
        "around the floor of the scale": normal * top * 1e-7,
        "subnormal": normal * smallest * 8,
        "ties": np.stack([ramp - top, top - ramp, ramp - top / 2, (ramp - top) / 8, ramp * 4]),
    }
    # A tie of the edge itself: both ends equally far from zero.
    kinds["symmetric"] = np.where(np.arange(group) % 2, 1.0, -1.0)[None, :] * np.asarray([[top / 2], [1.0], [0.37]])
    return {name: rows.astype(oracle.numpy_dtype(dtype)) for name, rows in kinds.items()}


# --- activations ----------------------------------------------------------------------------------------------

_SUBNORMAL: Final = 1e-40


def _outliers(normal: Array, random: np.random.Generator) -> Array:
    return np.where(random.random(normal.shape) < 0.01, 1000 * normal, normal)


_DRAWN: Final[Mapping[str, Callable[[Array, np.random.Generator], Array]]] = MappingProxyType(
    {
        "gaussian": lambda normal, _: normal,
        "outliers 1000x": _outliers,
        "offset": lambda normal, _: 3 + normal,
        "sparse": lambda normal, random: np.where(random.random(normal.shape) < 0.95, 0.0, normal),
        "huge": lambda normal, _: normal * 1e30,
        "tiny": lambda normal, _: normal * 1e-30,
        "subnormal": lambda normal, _: normal * _SUBNORMAL,
        "zero": lambda normal, _: 0 * normal,
    }
)

ACTIVATIONS: Final = tuple(_DRAWN)
"""Kinds of activations; float16 has its own range for huge, tiny and subnormal ones."""

_FLOAT16: Final = {"huge": 1.5e4, "tiny": 1e-4, "subnormal": 2.0**-20}


def activations(kind: str, shape: tuple[int, ...], dtype: str) -> Array:
    """An x of that kind.

    Parameters
    ----------
    kind : str
        One of `ACTIVATIONS`.
    shape : tuple of int
    dtype : str

    Returns
    -------
    array, shape `shape`, `dtype`
    """
    random = rng("x", kind, shape)
    normal = random.standard_normal(shape)
    if dtype == "float16" and kind in _FLOAT16:
        return np.asarray(np.clip(normal, -4, 4) * _FLOAT16[kind], np.float16)
    return np.asarray(_DRAWN[kind](normal, random)).astype(oracle.numpy_dtype(dtype))


# --- shapes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeClass:
    """Shapes of x and w for a product; K stands for whole groups, and one of ragged length for a short last group.

    Attributes
    ----------
    x, w : tuple of int
        Leading axes, then M (x only; none for 1-D x) and N. K is appended by `of`.
    groups : int
        Groups in K.
    extra : int
        Elements in a short last group.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    groups: int = 2
    extra: int = 0

    def of(self, scheme: Scheme, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of x and of the stored weight; where transposed, N and K change roles."""
        grouped = self.groups * (scheme.group_size or 80) + self.extra
        if not transposed:
            return (*self.x, grouped), (*self.w, grouped)
        contracted = self.w[-1]
        return (*self.x, contracted), (*self.w[:-1], contracted, grouped)


SHAPES: Final[Mapping[str, ShapeClass]] = MappingProxyType(
    {
        "1-D x": ShapeClass((), (24,)),
        "one row": ShapeClass((1,), (24,)),
        "three rows": ShapeClass((3,), (24,)),
        "many rows": ShapeClass((37,), (24,)),
        "thousands of rows": ShapeClass((2051,), (8,), groups=1),
        "no row of x": ShapeClass((0,), (24,)),
        "batched x": ShapeClass((2, 3, 5), (24,)),
        "batch of size 1": ShapeClass((1, 1, 2), (24,)),
        "empty batch": ShapeClass((0, 2), (24,)),
        "one output": ShapeClass((2,), (1,)),
        "no output": ShapeClass((2,), (0,)),
        "odd outputs": ShapeClass((2,), (13,)),
        "hundreds of outputs": ShapeClass((2,), (301,)),
        "one group": ShapeClass((2,), (24,), groups=1),
        "ragged": ShapeClass((3,), (10,), extra=5),
        "shorter than a group": ShapeClass((3,), (10,), groups=0, extra=9),
        "one element": ShapeClass((3,), (10,), groups=0, extra=1),
        "stack": ShapeClass((3, 4), (3, 12)),
        "stack, shared x": ShapeClass((4,), (3, 12)),
        "stack, 1-D x": ShapeClass((), (3, 12)),
        "stack of one": ShapeClass((4, 2), (1, 12)),
        "stack of none": ShapeClass((0, 2), (0, 12)),
        "stacks that broadcast": ShapeClass((2, 1, 4), (3, 12)),
        "stacks that broadcast both ways": ShapeClass((1, 3, 4), (2, 1, 12)),
        "ragged stack": ShapeClass((2, 2), (2, 9), extra=3),
    }
)
"""Shape classes of products, by name."""
