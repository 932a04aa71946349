"""How a product is divided over devices: XLA would gather the whole weight around a call that it can't look into.

The weight's rows and the groups of its columns may lie on different devices, and so may rows of x. Where the axis that
is summed over is divided, the parts are added up afterwards; nothing of the weight ever moves.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quantcore import Scheme

__all__ = ["Product", "axis_names", "device_count", "divided", "unit"]

Array = Any


class Product(NamedTuple):
    """What is static of a product; `columns` is the logical length of the grouped axis."""

    scheme: Scheme
    columns: int
    along_rows: bool
    precision: str


Local = Callable[[Product, Array, tuple[Array, ...], Array], Array]
"""(product, x, leaves, which) → the result, on one device."""


def unit(scheme: Scheme) -> int:
    """The least number of columns that are whole groups and whole words; groups aside where the row is one."""
    return math.lcm(scheme.group_size or 1, 32)


@cache
def divided(local: Local, product: Product) -> Any:
    """The product as a function of x, packed, scales, biases and which, that XLA knows how to divide."""

    @custom_partitioning  # type: ignore[untyped-decorator]
    def whole(x: Array, packed: Array, scales: Array, biases: Array, which: Array) -> Array:
        return local(product, x, (packed, scales, biases), which)

    def part(mesh: Mesh, given: Any, result: Any) -> Any:
        return _part(local, product, mesh, given, result)

    def rule(mesh: Any, given: Any, result: Any) -> Any:
        return _rule(product)

    whole.def_partition(partition=part, sharding_rule=rule)
    return whole


def _rule(product: Product) -> Any:
    """Shardy's rule: which axes are divided together.

    p: products, m: rows of x, n: rows of the weight, h: units of columns, of u codes, v words and w groups each.
    """
    size = unit(product.scheme)
    units = product.columns // size
    within = {"u": size, "v": size * product.scheme.bits // 32}
    if product.scheme.group_size is not None:
        within["w"] = size // product.scheme.group_size
    divisible = units > 1 and product.columns % size == 0
    axis = {name: name for name in "uvw"}
    sizes: dict[str, int] = {}
    if divisible:  # a factor of size 1 must stand alone
        axis.update({name: f"(h {name})" if length > 1 else "h" for name, length in within.items()})
        sizes = {name: length for name, length in within.items() if length > 1}
        if "h" not in axis.values():
            sizes["h"] = units
    weight = f"e n {axis['v']}, e n {axis['w']}, e n {axis['w']}, p"
    x, out = ("n", axis["u"]) if product.along_rows else (axis["u"], "n")
    summed = ("n",) if product.along_rows else ("h",) if divisible else ()
    text = f"p m {x}, {weight} -> p m {out}"
    fixed = sorted((name for name in "euvw" if name in text), key=text.index)
    return text, {"reduction_factors": summed, "need_replication_factors": tuple(fixed), **sizes}


def _part(local: Local, product: Product, mesh: Mesh, given: Any, result: Any) -> Any:
    """The function for one device, and how its operands and its result lie."""
    x, packed = (_spec(each) for each in given[:2])
    rows, columns = packed[1], packed[2]
    if product.columns % (unit(product.scheme) * device_count(mesh, columns)):
        columns = None
    taken = set(axis_names(rows)) | set(axis_names(columns))
    batch, of_x = (None if taken & set(axis_names(axes)) else axes for axes in x[:2])
    if set(axis_names(batch)) & set(axis_names(of_x)):
        batch = None
    summed, kept = (rows, columns) if product.along_rows else (columns, rows)
    groups = None if product.scheme.group_size is None else columns
    mine = product._replace(columns=product.columns // device_count(mesh, columns))

    def lie(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def compute(x: Array, packed: Array, scales: Array, biases: Array, which: Array) -> Array:
        product_of_part = local(mine, x, (packed, scales, biases), which)
        return jax.lax.psum(product_of_part, axis_names(summed)) if axis_names(summed) else product_of_part

    leaves = (lie(None, rows, columns), lie(None, rows, groups), lie(None, rows, groups))
    return mesh, compute, lie(batch, of_x, kept), (lie(batch, of_x, summed), *leaves, lie(batch))


def _spec(shape: Any) -> tuple[Any, ...]:
    spec = tuple(shape.sharding.spec)
    return spec + (None,) * (len(shape.shape) - len(spec))


def axis_names(axes: Any) -> tuple[str, ...]:
    """Names of mesh axes in one entry of a PartitionSpec."""
    return () if axes is None else tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def device_count(mesh: Mesh, axes: Any) -> int:
    """Devices along the mesh axes in one entry of a PartitionSpec."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))
