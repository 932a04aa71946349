"""Weights encoded by the compiled kernel, on NumPy arrays."""

import sys
from functools import cache
from typing import Any, Final, TypeAlias

import numpy as np

from quantcore import Scheme
from quantcore_backends.cpu_kernels import compiled
from quantcore_backends.cpu_kernels.threads import native_pool

__all__ = ["encode_rows", "serves"]

Array: TypeAlias = np.ndarray[Any, Any]

_THREADED: Final = 1 << 16
"""Elements worth a second thread."""


def serves(dtype: np.dtype[Any], scheme: Scheme) -> bool:
    """Whether there is a kernel: Numba is there, and there are more than two codes."""
    return compiled.available() and scheme.bits > 1 and dtype in compiled.KINDS and sys.byteorder == "little"


def encode_rows(w: Array, scheme: Scheme, packed: Array) -> tuple[Array, Array]:
    """Scales and biases of rows, in float32, and their codes into `packed`.

    Parameters
    ----------
    w : array, shape (N, K), float32, float16 or bfloat16, rows in one piece each
    scheme : Scheme
    packed : array, shape (N, W), uint32, C-contiguous

    Returns
    -------
    scales, biases : array, shape (N, G), float32
        NaN where a group isn't finite.
    """
    rows, columns = w.shape
    groups = scheme.groups(columns)
    scales, biases = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    job, kernel = _job(), _kernel(scheme.bits)
    fields = {
        "x": w.ctypes.data,
        "x_row": w.strides[0],
        "in_features": columns,
        "kind": compiled.KINDS[w.dtype],
        "groups": groups,
        "group": scheme.group_size or columns,
        "packed": packed.ctypes.data,
        "packed_row": packed.strides[0],
        "scales": scales.ctypes.data,
        "biases": biases.ctypes.data,
        "scale_row": scales.strides[0],
    }
    for name, value in fields.items():
        job[name] = value
    from quantcore_backends.cpu_kernels.pool import parallel

    pool = native_pool()
    spread = pool.threads if rows * columns >= _THREADED else 1
    part = max(1, rows // (8 * spread)) if spread > 1 else rows
    parallel(pool.address if spread > 1 else 0, kernel.address, job.ctypes.data, rows, part, 0)
    return scales, biases


def _job() -> Array:
    from quantcore_backends.cpu_kernels.job import JOB

    return np.zeros(1, JOB)


@cache
def _kernel(bits: int) -> Any:
    from quantcore_backends.cpu_kernels.encoding import encoder

    return encoder(bits)
