"""The call surface: dequantize, products, take, gather_dot. Each checks shapes, asks dispatch, and calls the kernel.

An operand may always be dense as well, so that code is written once for quantized and dense weights.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from quantcore import arrays, dense, dispatch, registry
from quantcore.contraction import Contraction
from quantcore.dtypes import dtype_name, native_dtype
from quantcore.errors import UnsupportedError
from quantcore.hookspecs import Precision
from quantcore.tensor import QuantizedTensor

__all__ = ["canonical", "dequantize", "dot", "gather_dot", "matmul", "prepack", "take", "tensordot"]


def dequantize(qw: Any, /, *, dtype: Any = None, backend: str | None = None) -> Any:
    """The dense weight.

    Parameters
    ----------
    qw : QuantizedTensor, shape (..., N, K)
        A dense array is returned as it is, cast to `dtype`.
    dtype : dtype or str, optional
        By default ``qw.dtype``.
    backend : str, optional
        The backend to use; by default the one of qw's library.

    Returns
    -------
    array, shape (..., N, K)
        ``code * scale + bias`` in float32, rounded once to `dtype`.

    Raises
    ------
    TypeError
        If qw is neither, or `dtype` isn't real floating.
    NoBackendError, UnsupportedError, BackendNotFoundError, BackendUnavailableError
    """
    name = None if dtype is None else dense.floating("dequantize", "dtype", dtype)
    if not isinstance(qw, QuantizedTensor):
        if not arrays.is_array(qw):
            raise TypeError(f"dequantize: takes a QuantizedTensor or an array, not {type(qw).__name__}")
        dense.check_backend("dequantize", backend)
        return qw if name is None else dense.cast(qw, name)
    base = qw.mT if qw.transposed else qw
    function, name, _, _ = dispatch.weight_route("dequantize", base, name, backend)
    whole = function(base, name)
    return arrays.plain_namespace(whole).matrix_transpose(whole) if qw.transposed else whole


def dot(
    x: Any,
    w: Any,
    /,
    *,
    axes: Any = None,
    out_dtype: Any = None,
    precision: Precision | None = None,
    backend: str | None = None,
) -> Any:
    """The linear-layer product: contracts the last axis of x with the last axis of w.

    Exactly ``matmul(x, matrix_transpose(w))``, for dense or quantized operands; leading axes broadcast as there.
    For a weight of shape (out, in) it is ``x @ dequantize(w).T``.

    Parameters
    ----------
    x : array, shape (..., M, K) or (K,), real floating
        Of the same library and device as w. May be the quantized operand instead.
    w : QuantizedTensor or array, shape (..., N, K)
        Where both operands are quantized, the smaller is dequantized.
    axes : int or pair of sequences of int, optional
        Contract these axes instead: exactly :func:`tensordot`, without batching. ``([2], [1])`` is Nx's notation.
    out_dtype : dtype or str, optional
        By default equal dtypes of x and w stay, float16 with bfloat16 gives float32, else the wider of the two.
    precision : {"default", "highest", "fast"}, optional
        Bound on the error (NMSE per row of x): 1e-8, 1e-12, 1e-4. By default that of ``use_precision``.
    backend : str, optional
        The backend to use; by default that of ``use_backend``, else the one of the arrays' library.

    Returns
    -------
    array, shape (..., M, N), or (..., N) for 1-D x

    Raises
    ------
    ValueError
        If the shapes don't fit.
    TypeError
        If x isn't real floating, or of another library or device.
    NoBackendError, UnsupportedError, BackendNotFoundError, BackendUnavailableError

    Examples
    --------
    >>> qw = quantize(w, bits=4)          # w: (out, in)
    >>> y = dot(x, qw)                    # x: (..., in) → y: (..., out)
    """
    if axes is not None:
        return tensordot(x, w, axes=axes, out_dtype=out_dtype, precision=precision, backend=backend)
    return _dot("dot", x, w, out_dtype, precision, backend)


def matmul(
    x: Any,
    w: Any,
    /,
    *,
    out_dtype: Any = None,
    precision: Precision | None = None,
    backend: str | None = None,
) -> Any:
    """Matrix product as in the array API, where either operand may be quantized.

    Parameters
    ----------
    x : array or QuantizedTensor, shape (..., M, K) or (K,)
    w : QuantizedTensor or array, shape (..., K, N) or (K,)
    out_dtype, precision, backend : optional
        As in :func:`dot`.

    Returns
    -------
    array, shape (..., M, N); a 1-D operand's axis is left out

    Raises
    ------
    ValueError
        If the shapes don't fit, or there is no such precision.
    TypeError
        If an operand isn't real floating, or they are of different libraries or devices.
    NoBackendError, UnsupportedError, BackendNotFoundError, BackendUnavailableError
    """
    if isinstance(w, QuantizedTensor):
        return _dot("matmul", x, w.mT, out_dtype, precision, backend)
    options = {"out_dtype": out_dtype, "precision": precision, "backend": backend}
    if not isinstance(x, QuantizedTensor):
        return dense.matmul("matmul", x, w, options)
    dense.check_operand("matmul", w)
    return _product("matmul", x, dense.swapped(w), options)


def tensordot(
    x: Any,
    w: Any,
    /,
    *,
    axes: int | Sequence[Any] = 2,
    out_dtype: Any = None,
    precision: Precision | None = None,
    backend: str | None = None,
) -> Any:
    """Contraction over named axes as in the array API, where either operand may be quantized.

    Parameters
    ----------
    x, w : array or QuantizedTensor
    axes : int or pair of sequences of int
        n: the last n axes of x with the first n of w; or the axes of each.
    out_dtype, precision, backend : optional
        As in :func:`dot`.

    Returns
    -------
    array
        Free axes of x, then free axes of w. Nothing is batched.

    Raises
    ------
    ValueError
        If the axes don't fit, or if they take both or neither of the last two axes of the quantized operand:
        that is no matrix product; dequantize first.
    """
    options = {"out_dtype": out_dtype, "precision": precision, "backend": backend}
    x, w = _one_quantized(x, w)
    for operand in (x, w):
        if not isinstance(operand, QuantizedTensor):
            dense.check_operand("tensordot", operand)
    plan = Contraction.of(tuple(x.shape), tuple(w.shape), axes)
    if isinstance(w, QuantizedTensor):
        return _contract(x, w, plan, options)
    if isinstance(x, QuantizedTensor):
        product = _contract(w, x, plan.swapped(), options)
        free = len(plan.w_free)
        order = (*range(free, len(product.shape)), *range(free))
        return arrays.plain_namespace(product).permute_dims(product, order)
    xp, x, w, name = dense.operands("tensordot", x, w, options)
    return dense.cast(xp.tensordot(x, w, axes=(list(plan.x_axes), list(plan.w_axes))), name)


def take(qw: Any, indices: Any, /, axis: int = 0, *, out_dtype: Any = None, backend: str | None = None) -> Any:
    """Dense slices of a weight along an ungrouped axis, the rows of an embedding table, say.

    Only the slices that are asked for are unpacked.

    Parameters
    ----------
    qw : QuantizedTensor or array
    indices : int, sequence of int, or array of integers of any shape
        Of qw's library. Negative ones count from the end.
    axis : int
        Any axis but the grouped one.
    out_dtype : dtype or str, optional
        By default ``qw.dtype``.
    backend : str, optional

    Returns
    -------
    array, shape ``qw.shape[:axis] + indices.shape + qw.shape[axis + 1:]``

    Raises
    ------
    IndexError
        If an index is out of range. A library that computes lazily (MLX) can't raise for the contents of an array
        of indices: those slices are NaN.
    ValueError
        If `axis` is the grouped one or out of range.
    """
    if not isinstance(qw, QuantizedTensor):
        dense.check_operand("take", qw)
    axis = _checked_axis(qw, axis)
    xp, where = _indices("take", indices, qw.shape[axis], qw.packed if isinstance(qw, QuantizedTensor) else qw)
    name = None if out_dtype is None else dense.floating("take", "out_dtype", out_dtype)
    if not isinstance(qw, QuantizedTensor):
        dense.check_backend("take", backend)
        try:
            rows = dense.take(qw, where, axis, xp)
        except IndexError as error:
            raise IndexError(f"take: {error} (array {tuple(qw.shape)}, axis {axis})") from None
        return rows if name is None else dense.cast(rows, name)
    base = qw.mT if qw.transposed else qw
    from_last = qw.transposed and axis == qw.ndim - 1
    axis -= from_last
    function, name, _, _ = dispatch.weight_route("take", base, name, backend)
    try:
        rows = function(base, where, axis, name)
    except IndexError as error:
        raise IndexError(f"take: {error} (weight {qw.shape}, {qw.scheme})") from None
    return _orient_taken(rows, axis, from_last, xp) if qw.transposed else rows


def gather_dot(
    x: Any,
    qw: Any,
    /,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    *,
    out_dtype: Any = None,
    precision: Precision | None = None,
    backend: str | None = None,
) -> Any:
    """Products of chosen matrices of x with chosen matrices of a stack of weights: mixture-of-experts layers.

    The semantics are those of ``mx.gather_qmm(transpose=True)``.

    Parameters
    ----------
    x : array, shape (..., M, K), real floating
    qw : QuantizedTensor or array, shape (..., N, K)
    lhs_indices, rhs_indices : array of integers, optional
        Flat indices into the leading axes of x and of qw; they broadcast. None stands for all, in their own shape.
    out_dtype, precision, backend : optional
        As in :func:`dot`.

    Returns
    -------
    array, shape broadcast(lhs_indices, rhs_indices).shape + (M, N)

    Raises
    ------
    IndexError
        If an index is out of range; NaN instead in libraries that compute lazily, as for :func:`take`.
    """
    if isinstance(x, QuantizedTensor):
        raise TypeError(
            f"gather_dot: x is quantized ({x.scheme}, shape {x.shape}), but only the second operand may be; call "
            ".dequantize() first"
        )
    dense.check_operand("gather_dot", x)
    if len(x.shape) < 2:
        raise ValueError(f"gather_dot: x needs at least 2 axes, not shape {tuple(x.shape)}; add an axis of length 1")
    if not isinstance(qw, QuantizedTensor):
        dense.check_operand("gather_dot", qw)
    check_contracted("gather_dot", x, qw)
    like = qw.packed if isinstance(qw, QuantizedTensor) else qw
    lhs = _flat_indices("gather_dot", lhs_indices, tuple(x.shape[:-2]), like)
    rhs = _flat_indices("gather_dot", rhs_indices, tuple(qw.shape[:-2]), like)
    try:
        np.broadcast_shapes(tuple(lhs.shape), tuple(rhs.shape))
    except ValueError:
        raise ValueError(
            f"gather_dot: lhs_indices of shape {tuple(lhs.shape)} and rhs_indices of shape {tuple(rhs.shape)} don't "
            "broadcast"
        ) from None
    if not isinstance(qw, QuantizedTensor):
        return dense.gather(x, qw, lhs, rhs, {"out_dtype": out_dtype, "precision": precision, "backend": backend})
    function, dtype, precision, _ = dispatch.product_route("gather_dot", x, x.shape, qw, out_dtype, precision, backend)
    try:
        return function(x, qw, lhs, rhs, dtype, precision)
    except IndexError as error:
        raise IndexError(f"gather_dot: {error} (x {tuple(x.shape)}, weight {qw.shape}, {qw.scheme})") from None


def prepack(qw: QuantizedTensor, /, backend: str | None = None) -> QuantizedTensor:
    """The tensor in a layout that its backend computes faster in; the same tensor where there is none.

    Parameters
    ----------
    qw : QuantizedTensor, shape (..., N, K)
    backend : str, optional
        The backend to ask; by default those of qw's library, in their order.

    Returns
    -------
    QuantizedTensor, shape (..., N, K)
        ``qw.canonical()`` undoes the layout exactly.

    Raises
    ------
    TypeError
        If qw isn't a QuantizedTensor.
    NoBackendError, BackendNotFoundError, BackendUnavailableError
    """
    if not isinstance(qw, QuantizedTensor):
        raise TypeError(f"prepack: takes a QuantizedTensor, not {type(qw).__name__}")
    if qw.layout != "row":
        return qw
    base = qw.mT if qw.transposed else qw
    request, whole = dispatch.weight_request("prepack", qw), dispatch.weight_request("dequantize", base)
    for candidate in dispatch.candidates(request, backend, registry.snapshot()):
        if not dispatch.weigh(candidate, request):
            return candidate.hook("prepack")(qw)  # type: ignore[no-any-return]
        if not dispatch.weigh(candidate, whole):
            break  # it computes with the tensor as it is; a layout would hand the tensor to another backend
    return qw


def canonical(qw: QuantizedTensor, /) -> QuantizedTensor:
    """The tensor in layout ``"row"``; ``qw.canonical()`` calls this where there is something to undo."""
    for candidate in registry.snapshot().for_array(qw.packed):
        if candidate.has("canonical") and not dispatch.weigh(candidate, dispatch.weight_request("prepack", qw)):
            return candidate.hook("canonical")(qw)  # type: ignore[no-any-return]
    raise UnsupportedError(
        f"canonical: no backend of {qw.library} knows the layout {qw.layout!r}; install the one that made it"
    )


# --- products -------------------------------------------------------------------------------------------------


def _dot(op: str, x: Any, w: Any, out_dtype: Any, precision: Any, backend: Any) -> Any:
    """``matmul(x, w.mT)``, with little between the caller and the kernel in the common cases.

    These are a 2-D weight, and NumPy's dense arrays, of keys and values in attention, say.
    """
    if type(w) is QuantizedTensor and type(x) is not QuantizedTensor:
        x_shape = getattr(x, "shape", None)
        packed = w.packed
        contracted = packed.shape[0] if w.annotation.transposed else w.in_features
        if x_shape and packed.ndim == 2 and x_shape[-1] == contracted:
            function, dtype, precision, _ = dispatch.product_route("dot", x, x_shape, w, out_dtype, precision, backend)
            return function(x, w, dtype, precision)
    elif type(x) is type(w) is np.ndarray and out_dtype is precision is backend is None and dense.is_simple(x, w):
        return np.matmul(x, np.swapaxes(w, -1, -2))
    return _product(op, x, w, {"out_dtype": out_dtype, "precision": precision, "backend": backend})


def _product(op: str, x: Any, w: Any, options: dict[str, Any]) -> Any:
    """``matmul(x, w.mT)`` for operands of any kind and rank."""
    x, w = _one_quantized(x, w)
    if isinstance(x, QuantizedTensor):
        dense.check_operand(op, w)
        product = _right_product(op, w, x, options, left=True)
        return product if len(w.shape) == 1 else dense.swapped(product)
    dense.check_operand(op, x)
    if isinstance(w, QuantizedTensor):
        return _right_product(op, x, w, options)
    dense.check_operand(op, w)
    return dense.matmul(op, x, dense.swapped(w), options)


def _right_product(op: str, x: Any, w: QuantizedTensor, options: dict[str, Any], left: bool = False) -> Any:
    check_contracted(op, x, w, left)
    if len(x.shape) == 1 and w.ndim > 2:
        return _right_product(op, x[None, :], w, options)[..., 0, :]
    try:
        np.broadcast_shapes(tuple(x.shape[:-2]), w.shape[:-2])
    except ValueError:
        raise ValueError(
            f"{op}: leading axes of x {tuple(x.shape)} and weight {w.shape} ({w.scheme}) don't broadcast"
        ) from None
    function, dtype, precision, _ = dispatch.product_route("dot", x, x.shape, w, **options)
    return function(x, w, dtype, precision)


def _contract(x: Any, w: QuantizedTensor, plan: Contraction, options: dict[str, Any]) -> Any:
    """Tensordot of a dense x with a quantized w, as one batched product."""
    plan.check_matrix_axis(w)
    xp = arrays.plain_namespace(x)
    if w.ndim - 1 not in plan.w_axes:
        w, plan = w.mT, plan.with_last_axis_contracted()
    summed, kept = plan.batch_axes()
    rows = math.prod(x.shape[i] for i in plan.x_free)
    stack = [plan.x_axis_of(i) for i in summed]
    operand = xp.permute_dims(x, (*stack, *plan.x_free, plan.x_axis_of(w.ndim - 1)))
    operand = xp.reshape(
        operand, (*(x.shape[i] for i in stack), *(1 for _ in kept), rows, x.shape[plan.x_axis_of(w.ndim - 1)])
    )
    order = (*summed, *kept, w.ndim - 2, w.ndim - 1)
    if order != tuple(range(w.ndim)):
        w = _permuted(w, order, xp)
    if not summed:
        product = _right_product("tensordot", operand, w, options)
    else:
        name = dispatch.product_dtype("tensordot", dtype_name(x.dtype), w.dtype_name, options["out_dtype"])
        wide = "float64" if name == "float64" else "float32"
        product = _right_product("tensordot", operand, w, {**options, "out_dtype": wide})
        product = dense.cast(xp.sum(product, axis=tuple(range(len(summed)))), name)
    kept_lengths = tuple(product.shape[:-2])
    product = xp.permute_dims(product, (len(kept), *range(len(kept)), len(kept) + 1))
    return xp.reshape(product, (*(x.shape[i] for i in plan.x_free), *kept_lengths, product.shape[-1]))


def _permuted(w: QuantizedTensor, order: tuple[int, ...], xp: Any) -> QuantizedTensor:
    """W with its batch axes permuted; its last two axes stay."""
    leaves, rebuild = w.flatten()
    return rebuild([xp.permute_dims(leaf, order) for leaf in leaves])


def _one_quantized(x: Any, w: Any) -> tuple[Any, Any]:
    """The operands, the smaller dequantized where both are quantized."""
    if isinstance(x, QuantizedTensor) and isinstance(w, QuantizedTensor):
        return (dequantize(x), w) if x.size <= w.size else (x, dequantize(w))
    return x, w


# --- checks ---------------------------------------------------------------------------------------------------


def check_contracted(op: str, x: Any, w: Any, left: bool = False) -> None:
    if x.shape[-1] == w.shape[-1]:
        return
    scheme = f" ({w.scheme})" if isinstance(w, QuantizedTensor) else ""
    as_written = w.mT.shape if op == "matmul" and not left else tuple(w.shape)
    raise ValueError(
        f"{op}: {x.shape[-1]} elements of x {tuple(x.shape)} can't be contracted with {w.shape[-1]} of the weight "
        f"{as_written}{scheme}; dot contracts the last axis of both, matmul the last of x with axis -2 of the "
        "weight: .mT swaps the weight's axes"
    )


def _checked_axis(w: Any, axis: Any) -> int:
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"take: axis must be an int, not {axis!r}")
    axis = operator.index(axis)
    ndim = len(w.shape)
    if not -ndim <= axis < ndim:
        raise ValueError(f"take: axis {axis} is out of range for shape {tuple(w.shape)}")
    axis %= ndim
    if isinstance(w, QuantizedTensor) and axis == ndim - (2 if w.transposed else 1):
        raise ValueError(
            f"take: axis {axis} of shape {w.shape} is the grouped one ({w.scheme}), whose codes are packed together; "
            "call .dequantize() first"
        )
    return int(axis)


def _indices(op: str, indices: Any, length: int, like: Any) -> tuple[Any, Any]:
    """Namespace, and the indices as an integer array of like's library."""
    xp = _namespace(op, like)
    if not arrays.is_array(indices):
        try:
            known = np.asarray(indices)
        except ValueError as error:
            raise ValueError(f"{op}: the indices are no array: {error}") from None
        if known.size == 0:
            known = known.astype(np.int64)
        _check_integer(op, known)
        if known.size and not (-length <= int(known.min()) and int(known.max()) < length):
            raise IndexError(f"{op}: indices from {known.min()} to {known.max()} are out of range for length {length}")
        return xp, _constant(xp, known.astype(np.int64), like)
    if arrays.library_of(indices) != arrays.library_of(like):
        raise TypeError(
            f"{op}: the indices are a {arrays.library_of(indices)} array and the weight is in "
            f"{arrays.library_of(like)}; use quantcore.to_library(indices, {arrays.library_of(like)!r})"
        )
    ours, theirs = arrays.device_of(like), arrays.device_of(indices)
    if ours != theirs and None not in (ours, theirs):
        raise TypeError(
            f"{op}: the indices are on {theirs} and the weight on {ours}; nothing moves between devices by itself: use "
            f"quantcore.to_library(indices, {arrays.library_of(like)!r}, qw.device)"
        )
    _check_integer(op, indices)
    return xp, _signed(indices, length, xp)


def _signed(indices: Any, length: int, xp: Any) -> Any:
    """Indices that a signed integer holds: larger ones, which as such would count from the end, become `length`."""
    if dtype_name(indices.dtype) not in ("uint32", "uint64"):
        return indices
    signed = xp.astype(indices, native_dtype("int64", indices))
    return xp.where(signed < 0, xp.asarray(length, dtype=signed.dtype), signed)


def _namespace(op: str, like: Any) -> Any:
    try:
        return arrays.plain_namespace(like)
    except TypeError:
        raise TypeError(
            f"{op}: the weight is made of {type(like).__module__}.{type(like).__qualname__}, which has no values; give "
            "it arrays, or pass it as an argument to a function that is traced, as by jax.eval_shape"
        ) from None


def _constant(xp: Any, values: np.ndarray[Any, Any], like: Any) -> Any:
    """`values` in the library and on the device of `like`."""
    if hasattr(like, "device"):
        return xp.asarray(values, device=array_api_compat.device(like))
    return xp.asarray(values)


def _check_integer(op: str, indices: Any) -> None:
    name = dtype_name(indices.dtype)
    if not name.startswith(("int", "uint")):
        raise TypeError(f"{op}: indices must be integers, not {name}")


def _flat_indices(op: str, indices: Any, shape: tuple[int, ...], like: Any) -> Any:
    count = math.prod(shape)
    if indices is None:
        return _constant(_namespace(op, like), np.arange(count).reshape(shape), like)
    return _indices(op, indices, count, like)[1]


def _orient_taken(rows: Any, axis: int, from_last: bool, xp: Any) -> Any:
    """Turn what `take` of an untransposed weight gave into the orientation of the transposed one."""
    *order, grouped = range(len(rows.shape))
    if from_last:
        return xp.permute_dims(rows, (*order[:axis], grouped, *order[axis:]))
    return xp.permute_dims(rows, (*order[:-1], grouped, order[-1]))
