"""How a call is computed, in words, for ``quantcore.explain``."""

import math
from typing import Final

import numpy as np

from quantcore import Call
from quantcore.dtypes import numpy_dtype
from quantcore_backends.cpu_kernels import compiled
from quantcore_backends.jax_backend import routes

__all__ = ["described"]

_PRODUCTS: Final = ("dot", "gather_dot")
_OWN: Final = "XLA's own operations compute it"


def described(op: str, call: Call) -> str:
    """Which path concrete arrays take, and which one a trace, with the reason of a slower one.

    Parameters
    ----------
    op : str
    call : Call
        With its shapes. Its device is None in a trace, where the platform isn't known yet.
    """
    elsewhere = routes.XLA_TILES if op in _PRODUCTS else _OWN
    if call.device not in (None, "cpu"):
        return f"{elsewhere}; the compiled kernels are for CPUs, not for {call.device}"
    inside = _on_cpu(call, op) if op in _PRODUCTS else _OWN
    if call.device is None:
        return f"on a CPU, {inside}" + ("" if elsewhere in inside else f"; elsewhere, {elsewhere}")
    kernels = "our CPU kernels" if compiled.available() else "our CPU kernels in NumPy alone"
    return f"concrete arrays on one device go to {kernels}; inside jit, {inside}"


def _on_cpu(call: Call, op: str) -> str:
    assert call.x_shape is not None
    assert call.w_shape is not None
    assert call.x_dtype is not None
    gathered = op == "gather_dot" or math.prod(call.w_shape[:-2]) != 1
    rows = math.prod(call.x_shape[-2:-1] if gathered else call.x_shape[:-1])
    dtype = np.result_type(np.float32, numpy_dtype(call.x_dtype), numpy_dtype(call.out_dtype))
    return routes.described(call.scheme, dtype, rows, along_rows=call.transposed, precision=call.precision)
