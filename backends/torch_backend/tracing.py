"""What ``torch.compile`` and ``torch.export`` are told of quantcore.

A :class:`~quantcore.QuantizedTensor` is a pytree: its arrays are leaves, everything else is static. Dynamo doesn't look
into quantcore's own functions, which dispatch through a table that it couldn't guard: it puts the call into its graph,
AOTAutograd then runs it on traced tensors, and what stays is the operator that it dispatched to. So dispatch happens
once, at trace time.
"""

import operator
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree

import quantcore
from quantcore import QuantizedTensor, Scheme
from quantcore.dtypes import dtype_name

__all__ = ["register"]

_Static = tuple[str, int, str, str, bool]


@cache
def register() -> None:
    """Register the pytree, and the functions that Dynamo leaves closed. Once a process."""
    pytree.register_pytree_node(
        QuantizedTensor,
        _flatten,
        _unflatten,
        serialized_type_name="quantcore.QuantizedTensor",
        flatten_with_keys_fn=_flatten_with_keys,
        to_dumpable_context=list,
        from_dumpable_context=tuple,
    )
    substitute = torch.compiler.substitute_in_graph
    substitute(quantcore.dot)(_dot)
    substitute(quantcore.matmul)(_matmul)
    substitute(quantcore.tensordot)(_tensordot)
    substitute(quantcore.take)(_take)
    substitute(quantcore.gather_dot)(_gather_dot)
    substitute(quantcore.dequantize)(_dequantize)
    substitute(quantcore.array_namespace)(_array_namespace)
    torch.compiler.assume_constant_result(dtype_name)  # Dynamo can't follow it to NumPy, which knows no torch.dtype
    _teach_reversed_matmul()


def _teach_reversed_matmul() -> None:
    """Have Dynamo call ``Tensor.__rmatmul__`` for ``qw @ x``.

    Its table of reversed operators lacks this one (torch 2.13), so that it would call matmul with the operands swapped.
    """
    from torch._dynamo.variables import builtin

    builtin.populate_builtin_to_tensor_fn_map()
    builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(operator.matmul, torch.Tensor.__rmatmul__)


def _flatten(qw: QuantizedTensor) -> tuple[list[Any], _Static]:
    note = qw.annotation
    leaves = list(qw.flatten()[0])
    in_features = operator.index(qw.in_features)  # Dynamo would make an int that varies between calls symbolic
    return leaves, (str(note.scheme), in_features, note.dtype, note.layout, note.transposed)


def _flatten_with_keys(qw: QuantizedTensor) -> tuple[list[Any], _Static]:
    leaves, static = _flatten(qw)
    keys = (pytree.GetAttrKey(name) for name in ("packed", "scales", "biases"))
    return list(zip(keys, leaves, strict=False)), static  # biases may be missing


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _scheme_of(name: str) -> Scheme:
    # Dynamo would follow it into a lock, where strict export has weights among its inputs.
    return Scheme.parse(name)


def _unflatten(leaves: Any, static: _Static) -> QuantizedTensor:
    scheme, in_features, dtype, layout, transposed = static
    packed, scales, *biases = leaves
    bias = biases[0] if biases else None
    return QuantizedTensor(
        packed, scales, bias, _scheme_of(scheme), in_features, dtype=dtype, layout=layout, transposed=transposed
    )


# Dynamo puts an allowed function into its graph as it is, if its arguments are tensors and constants, in tuples and
# dicts at most. So tensors are taken apart before, in what stands in for our functions, and put together in `_closed`.


def _closed(name: str, operands: tuple[Any, ...], statics: tuple[_Static | None, ...], options: dict[str, Any]) -> Any:
    whole = [
        operand if static is None else _unflatten(operand, static)
        for operand, static in zip(operands, statics, strict=True)
    ]
    return getattr(quantcore, name)(*whole, **options)


torch.compiler.allow_in_graph(_closed)


def _call(name: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
    parts = [_flatten(each) if isinstance(each, QuantizedTensor) else (each, None) for each in operands]
    return _closed(name, tuple(part[0] for part in parts), tuple(part[1] for part in parts), options)


def _dot(
    x: Any, w: Any, /, *, axes: Any = None, out_dtype: Any = None, precision: Any = None, backend: Any = None
) -> Any:
    return _call("dot", (x, w), {"axes": axes, "out_dtype": out_dtype, "precision": precision, "backend": backend})


def _matmul(x: Any, w: Any, /, *, out_dtype: Any = None, precision: Any = None, backend: Any = None) -> Any:
    return _call("matmul", (x, w), {"out_dtype": out_dtype, "precision": precision, "backend": backend})


def _tensordot(
    x: Any, w: Any, /, *, axes: Any = 2, out_dtype: Any = None, precision: Any = None, backend: Any = None
) -> Any:
    return _call(
        "tensordot", (x, w), {"axes": axes, "out_dtype": out_dtype, "precision": precision, "backend": backend}
    )


def _take(qw: Any, indices: Any, /, axis: int = 0, *, out_dtype: Any = None, backend: Any = None) -> Any:
    return _call("take", (qw, indices), {"axis": axis, "out_dtype": out_dtype, "backend": backend})


def _gather_dot(
    x: Any,
    qw: Any,
    /,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    *,
    out_dtype: Any = None,
    precision: Any = None,
    backend: Any = None,
) -> Any:
    options = {"out_dtype": out_dtype, "precision": precision, "backend": backend}
    return _call("gather_dot", (x, qw, lhs_indices, rhs_indices), options)


def _dequantize(qw: Any, /, *, dtype: Any = None, backend: Any = None) -> Any:
    return _call("dequantize", (qw,), {"dtype": dtype, "backend": backend})


_namespace = quantcore.array_namespace(torch.empty(0))


def _array_namespace(*arrays_: Any) -> Any:
    return _namespace
