"""NumPy's and PyTorch's override protocols: which of their functions take a QuantizedTensor."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from quantcore import ops
from quantcore.tensor import QuantizedTensor

__all__ = ["numpy_function", "numpy_ufunc", "torch_function"]


def _numpy_dot(a: Any, b: Any) -> Any:
    quantized = a if isinstance(a, QuantizedTensor) else b
    if quantized.ndim != 2 or (quantized is a and len(b.shape) > 2):
        raise TypeError(
            f"numpy.dot takes a QuantizedTensor with 2 axes only, not shape {quantized.shape}; use quantcore.matmul"
        )
    return ops.matmul(a, b)


def _numpy_take(a: Any, indices: Any, axis: int | None = None) -> Any:
    if axis is None:
        raise ValueError("numpy.take of a QuantizedTensor needs an axis; call .dequantize() to take from it flattened")
    return ops.take(a, indices, axis=axis)


def _numpy_tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    return ops.tensordot(a, b, axes=axes)


def _matrix_transpose(x: QuantizedTensor, /) -> QuantizedTensor:
    return x.mT


def _torch_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    product = ops.dot(input, weight)
    return product if bias is None else product + bias


def _torch_embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False,
    sparse: Any = False,
) -> Any:
    if max_norm is not None:
        raise TypeError("torch embedding with max_norm changes the table in place; a QuantizedTensor is immutable")
    return ops.take(weight, input, axis=0)  # the other arguments are about the table's gradient, and it has none


def _torch_mm(input: Any, mat2: Any) -> Any:
    _check_axes("mm", 2, input, mat2)
    return ops.matmul(input, mat2)


def _torch_bmm(input: Any, mat2: Any) -> Any:
    _check_axes("bmm", 3, input, mat2)
    return ops.matmul(input, mat2)


def _torch_addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    _check_axes("addmm", 2, mat1, mat2)
    product = ops.matmul(mat1, mat2)
    return beta * input + (product if alpha == 1 else alpha * product)


def _check_axes(name: str, axes: int, *operands: Any) -> None:
    for operand in operands:
        if len(operand.shape) != axes:
            raise ValueError(f"torch {name} takes operands with {axes} axes, not shape {tuple(operand.shape)}")


def _torch_tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    return ops.tensordot(a, b, axes=dims)


def _swapped_matmul(a: Any, b: Any) -> Any:
    return ops.matmul(b, a)


_NUMPY: Final[Mapping[str, Callable[..., Any]]] = {
    "dot": _numpy_dot,
    "matmul": ops.matmul,
    "matrix_transpose": _matrix_transpose,
    "take": _numpy_take,
    "tensordot": _numpy_tensordot,
}

_TORCH: Final[Mapping[str, Callable[..., Any]]] = {
    "__matmul__": ops.matmul,
    "__rmatmul__": _swapped_matmul,
    "addmm": _torch_addmm,
    "bmm": _torch_bmm,
    "embedding": _torch_embedding,
    "linear": _torch_linear,
    "matmul": ops.matmul,
    "mm": _torch_mm,
    "tensordot": _torch_tensordot,
}


def numpy_ufunc(ufunc: Any, method: str, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answer a NumPy ufunc that was given a QuantizedTensor: matmul only."""
    if ufunc.__name__ == "matmul" and method == "__call__" and not kwargs:
        return ops.matmul(*inputs)
    raise _refused(f"numpy.{ufunc.__name__}", kwargs, ["matmul"])


def numpy_function(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answer a NumPy function that was given a QuantizedTensor."""
    return _answer(_NUMPY, f"numpy.{func.__name__}", func.__name__, args, kwargs)


def torch_function(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answer a torch function that was given a QuantizedTensor."""
    name = getattr(func, "__name__", str(func))
    return _answer(_TORCH, f"torch {name}", name, args, kwargs)


def _answer(
    table: Mapping[str, Callable[..., Any]], shown: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    function = table.get(name)
    if function is None:
        raise _refused(shown, {}, sorted(table))
    return function(*args, **kwargs)


def _refused(name: str, kwargs: Mapping[str, Any], taken: list[str]) -> TypeError:
    with_options = f" with {', '.join(kwargs)}" if kwargs else ""
    return TypeError(
        f"{name}{with_options} doesn't take a QuantizedTensor; call .dequantize() for a dense array "
        f"(taken: {', '.join(taken)})"
    )
