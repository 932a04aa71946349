"""Matrix products in float32 where a library's own would round its operands."""

import sys
from typing import Any

from array_api_compat import array_namespace

__all__ = ["matmul", "on_tensor_cores"]

Array = Any


def on_tensor_cores() -> bool:
    """Whether float32 products of MLX arrays go through TF32, which keeps 11 bits of each operand: on CUDA.

    Measured with MLX 0.32.4 on an H100: NMSE 1e-7, where the bound is 1e-8.
    """
    mx = sys.modules.get("mlx.core")
    return mx is not None and mx.default_device() != mx.cpu and bool(mx.cuda.is_available())


def matmul(x: Array, w: Array) -> Array:
    """``matmul(x, w)`` to float32's accuracy, or within 1e-9 of it as NMSE.

    Where operands would be rounded, each is split into a bfloat16 part, which TF32 holds exactly, and the rest; the
    product of the two rests is left out.
    """
    xp = array_namespace(x)
    if x.dtype != xp.float32 or not (xp.__name__ == "mlx.core" and on_tensor_cores()):
        return xp.matmul(x, w)
    (x_high, x_low), (w_high, w_low) = _split(x, xp), _split(w, xp)
    return xp.matmul(x_high, w_high) + (xp.matmul(x_high, w_low) + xp.matmul(x_low, w_high))


def _split(array: Array, xp: Any) -> tuple[Array, Array]:
    high = xp.astype(xp.astype(array, xp.bfloat16), xp.float32)
    return high, array - high
