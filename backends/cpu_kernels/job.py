"""What a product's compiled kernels are told: one record in memory, since a thread pool passes one address."""

from typing import Any, Final

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels.disk_cache import COMPILED, njit
from quantcore_backends.cpu_kernels.vectors import BYTE, pointer_to

__all__ = [
    "CALL",
    "JOB",
    "KERNEL",
    "PLAN",
    "addresses_at",
    "bytes_at",
    "doubles_at",
    "floats_at",
    "integers_at",
    "job_at",
    "row_of",
    "words_at",
]

CALL: Final = (
    # x and the result, float32
    "x",
    "x_row",
    "out",
    "rows",
    # activations as integers: see activations.py
    "codes",
    "code_scales",
    "sums",
    # the weight
    "packed",
    "scales",
    "biases",
    # what sums of x are multiplied by: 1, or with scales in place of biases what makes these of them
    "sum_factor",
    # the copy of the weight's last rows, and scratch memory for each thread
    "copy",
    "scratch",
    # set by a kernel that can't serve
    "refused",
)
"""Fields that a call fills in. Addresses and strides are in bytes."""

PLAN: Final = (
    "out_features",
    "in_features",
    "groups",
    "out_row",
    "packed_row",
    "scale_row",
    "scale_step",
    "kind",
    # elements of a group; steps of a kernel, as a power of two, and runs of x that share a scale
    "group",
    "group_shift",
    "group_runs",
    # rows from `safe` on are read from the copy, behind which there is memory that a vector may read
    "safe",
    "copy_row",
    "codes_row",
    "code_scales_row",
    "sums_row",
    "tile_words",
    "scratch_size",
    # squared error of a row of x over its squared length up to which integers serve, times 1e18
    "bound",
)
"""Fields that follow from shapes and strides."""

JOB: Final = np.dtype([(name, np.int64) for name in (*CALL, *PLAN)])

KERNEL: Final = types.void(types.intp, types.intp, types.intp, types.intp)
"""Signature of a kernel: the job's address, the thread's number, the first and the end of its part."""


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return pointer_to(builder, args[0], BYTE)

    return types.voidptr(types.intp), generate


@njit(**COMPILED)
def floats_at(address, count):
    """float32 memory as an array."""
    return carray(_pointer(address), count, np.float32)


@njit(**COMPILED)
def doubles_at(address, count):
    """float64 memory as an array."""
    return carray(_pointer(address), count, np.float64)


@njit(**COMPILED)
def integers_at(address, count):
    """int32 memory as an array."""
    return carray(_pointer(address), count, np.int32)


@njit(**COMPILED)
def bytes_at(address, count):
    """uint8 memory as an array."""
    return carray(_pointer(address), count, np.uint8)


@njit(**COMPILED)
def words_at(address, count):
    """uint64 memory as an array."""
    return carray(_pointer(address), count, np.uint64)


@njit(**COMPILED)
def addresses_at(address, count):
    """int64 memory as an array."""
    return carray(_pointer(address), count, np.int64)


@njit(**COMPILED)
def job_at(address):
    """The job at an address."""
    return carray(_pointer(address), 1, JOB)[0]


@njit(**COMPILED)
def row_of(job, n):
    """Address of a packed row."""
    if n < job.safe:
        return job.packed + n * job.packed_row
    return job.copy + (n - job.safe) * job.copy_row
