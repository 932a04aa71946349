"""Why a call goes to the backend that it goes to."""

from typing import Any

from quantcore import arrays, dense, dispatch, ops, registry
from quantcore.dispatch import Explanation, Request, Verdict
from quantcore.dtypes import dtype_name
from quantcore.errors import QuantcoreError
from quantcore.scheme import Scheme
from quantcore.tensor import QuantizedTensor

__all__ = ["explain"]

_PRODUCTS = ("dot", "matmul", "gather_dot")
_ALONE = ("dequantize", "take", "prepack")
_KERNELS = {"matmul": "dot"}


def explain(
    op: str,
    /,
    *args: Any,
    scheme: Scheme | str | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    backend: str | None = None,
) -> Explanation:
    """Say which backend computes a call, and why, without computing it.

    Parameters
    ----------
    op : {"dot", "matmul", "gather_dot", "quantize", "dequantize", "take", "prepack"}
    *args : array or QuantizedTensor
        The call's operands: ``explain("dot", x, qw)``, ``explain("quantize", w)``, ``explain("take", qw)``.
    scheme : Scheme or str, optional
        For ``"quantize"``.
    out_dtype, precision, backend : optional
        As the call would have them.

    Returns
    -------
    Explanation
        Print it, or read `backend` and `verdicts`. The chosen backend's verdict has the `path` that it takes, where it
        has several: which kernel, and why not a faster one.

    Raises
    ------
    ValueError, TypeError
        If `op` is unknown, or if the operands don't fit it.
    """
    if scheme is not None and op != "quantize":
        raise TypeError(f"explain: {op} takes the scheme of its weight; scheme is for quantize")
    request = _request(op, args, scheme, precision, out_dtype)
    try:
        asked = dispatch.candidates(request, backend, registry.snapshot())
    except QuantcoreError as error:
        return Explanation(str(request), None, (), str(error).removeprefix(f"{request}: "))
    verdicts = []
    chosen: str | None = None
    for candidate in asked:
        reason = dispatch.weigh(candidate, request)
        if not reason and chosen is None:
            chosen = candidate.name
            verdicts.append(Verdict(chosen, True, "", dispatch.path(candidate, request)))
        else:
            verdicts.append(Verdict(candidate.name, False, reason or "would compute it as well"))
    return Explanation(str(request), chosen, tuple(verdicts))


def _request(op: str, args: tuple[Any, ...], scheme: Scheme | str | None, precision: Any, out_dtype: Any) -> Request:
    if op == "quantize":
        (w,) = _exactly(op, args, 1)
        if not arrays.is_array(w):
            raise TypeError(f"explain: quantize takes a dense array, not {type(w).__name__}")
        return dispatch.quantize_request(w, Scheme() if scheme is None else Scheme.parse(scheme))
    if op in _PRODUCTS:
        x, w = _exactly(op, args, 2)
        if isinstance(x, QuantizedTensor) == isinstance(w, QuantizedTensor):
            raise TypeError(f"explain: {op} is dispatched where exactly one operand is quantized")
        if isinstance(w, QuantizedTensor):
            w = w.mT if op == "matmul" else w
            _check_fit(op, x, w)
            return dispatch.product_request(_KERNELS.get(op, op), x, w, precision, out_dtype)
        if op == "gather_dot":
            raise TypeError("explain: gather_dot takes the weight as its second operand")
        if op == "matmul" and arrays.is_array(w) and len(w.shape) > 1:
            w = arrays.plain_namespace(w).matrix_transpose(w)
        _check_fit(op, w, x)
        return dispatch.product_request("dot", w, x, precision, out_dtype)
    if op in _ALONE:
        (w,) = _exactly(op, args[:1], 1)
        if not isinstance(w, QuantizedTensor):
            raise TypeError(f"explain: {op} takes a QuantizedTensor, not {type(w).__name__}")
        flip = w.transposed and op != "prepack"  # the core transposes what these kernels give
        return dispatch.weight_request(
            op, w.mT if flip else w, None if out_dtype is None else dtype_name(out_dtype), precision
        )
    raise ValueError(f"explain: unknown op {op!r}; ops: quantize, {', '.join(_PRODUCTS + _ALONE)}")


def _check_fit(op: str, x: Any, w: QuantizedTensor) -> None:
    """Raise where the operands have no product: `w` is contracted along its last axis."""
    if arrays.is_array(x):
        dense.check_operand(op, x)
        ops.check_contracted(op, x, w)


def _exactly(op: str, args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(args) != count:
        raise TypeError(f"explain: {op} takes {count} operand{'s' * (count > 1)}, got {len(args)}")
    return args
