"""Products of few rows of x, rounded to integers: first of 8 bits where that is asked for, then of 16, then in floats.

What a kernel needs is worked out here from the shapes, not taken from the module: it depends on the processor.
"""

from typing import Final

from numba import carray, types

from quantcore import Scheme
from quantcore_backends.cpu_kernels import integer, layout
from quantcore_backends.cpu_kernels.activations import run_length
from quantcore_backends.cpu_kernels.disk_cache import cfunc, njit
from quantcore_backends.cpu_kernels.job import CALL, JOB, PLAN, job_at
from quantcore_backends.cpu_kernels.pool import call_kernel
from quantcore_backends.cpu_kernels.vectors import LANES
from quantcore_backends.jax_backend.ffi import pool
from quantcore_backends.jax_backend.ffi.bodies import chosen_weight, floats
from quantcore_backends.jax_backend.ffi.frame import (
    FIRST_ROUNDED,
    OPTIONS,
    TABLE,
    call2,
    error,
    free,
    load64,
    malloc,
    store64,
    table,
)
from quantcore_backends.jax_backend.ffi.operands import (
    EXHAUSTED,
    INVALID,
    bytes_at,
    no_body,
    no_memory,
    run_few_rows,
)

__all__ = ["install", "load", "run"]

_KIND, _BITS, _GROUP, _WIDTH = 8, 16, 32, 64
(_X, _PACKED, _SCALES, _BIASES, _WHICH, _OUT, _SUMS, _TAIL, _COUNT, _ROWS, _COLUMNS) = range(0, 88, 8)
_ROW, _SCALE_ROW = 112, 120

_JOB_BYTES: Final = (JOB.itemsize + 63) & -64
_PLAN_AT: Final = 8 * len(CALL)
_SAFE, _COPY_ROW = PLAN.index("safe"), PLAN.index("copy_row")
_MOST_RUN: Final = run_length(None)
_THREADED: Final = integer.THREADED

# What the task is told: kernel, first job, bytes from job to job, parts of a product, rows of a part, rows in all.
_KERNEL, _JOBS, _STRIDE, _PARTS, _PART, _ALL = range(0, 48, 8)
_TOLD = 64

_bound = njit(**OPTIONS)(layout.bound)
_of_few_rows = njit(**OPTIONS)(layout.of_few_rows)
_plan = njit(**OPTIONS)(layout.plan)
_lines = njit(**OPTIONS)(layout.lines)


@njit(**OPTIONS)
def _place(bits, group, kind, width):
    """Where in the table the kernels of a scheme stand: rounder, kernel, codes that they take at a time."""
    number = 0
    while group >> (4 + number):
        number += 1
    return FIRST_ROUNDED + 3 * (((number * 8 + bits - 1) * 3 + kind) * 2 + (1 if width == 8 else 0))


@cfunc(types.int64(types.int64, types.int64), cache=True, boundscheck=False, error_model="numpy")
def _task(chunk, told):
    """The kernel on some rows of one product, unless integers don't serve it."""
    parts, part = load64(told + _PARTS), load64(told + _PART)
    job = load64(told + _JOBS) + chunk // parts * load64(told + _STRIDE)
    if job_at(job).refused == 0:
        first = chunk % parts * part
        call_kernel(load64(told + _KERNEL), job, 0, first, min(first + part, load64(told + _ALL)))
    return 0


@njit(**OPTIONS)
def _over_parts(frame, told, products, work):
    """Run the kernel over all rows of all products, in threads where that pays."""
    rows, parts = load64(told + _ALL), 1
    if work >= _THREADED:
        part = max(16, rows // (8 * max(1, load64(table() + 16))) // 4 * 4)
        parts = (rows + part - 1) // part
        store64(told + _PART, part)
    else:
        store64(told + _PART, rows)
    store64(told + _PARTS, parts)
    task = load64(table() + 32)
    if work >= _THREADED:
        return pool.for_chunks(frame, task, told, products * parts)
    for product in range(products):
        call2(task, product, told)
    return True


@njit(**OPTIONS)
def _integers(frame, spec, block, products, width, served):
    """Multiply where that isn't done yet, and mark what integers of that width serve; False without memory."""
    bits, group, kind = load64(spec + _BITS), load64(spec + _GROUP), load64(spec + _KIND)
    count, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    row, scale_row = load64(block + _ROW), load64(block + _SCALE_ROW)
    entry = table() + 8 * _place(bits, group, kind, width)
    rounder, kernel, step = load64(entry), load64(entry + 8), load64(entry + 16)
    groups = scale_row // (4 if kind == 0 else 2)
    run = min(group, _MOST_RUN) if group else _MOST_RUN
    shift, reads, codes, scales, sums = _of_few_rows(columns, groups, bits, group, step, LANES, width)
    plan = _plan(
        rows,
        columns,
        row // 4,
        groups,
        row,
        scale_row,
        kind,
        bits,
        group,
        run,
        shift,
        reads,
        codes,
        scales,
        sums,
        0,
        0,
        _bound(rows, width),
    )
    safe, copy_row = plan[_SAFE], plan[_COPY_ROW]
    copied = rows - safe
    at_scales = _JOB_BYTES + _lines(codes * count)
    at_sums = at_scales + _lines(scales * count)
    at_copy = at_sums + _lines(sums * count)
    stride = at_copy + copied * copy_row
    memory = malloc(products * stride + _TOLD + 64)
    if memory == 0:
        return False
    told = memory + 63 & -64
    jobs = told + _TOLD
    for p in range(products):
        address = jobs + p * stride
        weight = chosen_weight(block, p)
        job = job_at(address)
        job.x, job.x_row = load64(block + _X) + 4 * p * count * columns, 4 * columns
        job.out, job.rows = load64(block + _OUT) + 4 * p * count * rows, count
        job.codes, job.code_scales, job.sums = address + _JOB_BYTES, address + at_scales, address + at_sums
        job.packed = load64(block + _PACKED) + weight * rows * row
        job.scales = load64(block + _SCALES) + weight * rows * scale_row
        job.biases = load64(block + _BIASES) + weight * rows * scale_row
        job.copy, job.scratch, job.refused = address + at_copy, 0, served[p]
        for i in range(len(plan)):
            store64(address + _PLAN_AT + 8 * i, plan[i])
        if served[p] == 0:
            for n in range(copied):
                source = carray(bytes_at(job.packed + (safe + n) * row), row)
                carray(bytes_at(job.copy + n * copy_row), copy_row)[:row] = source
            call_kernel(rounder, address, 0, 0, count)
    store64(told + _KERNEL, kernel)
    store64(told + _JOBS, jobs)
    store64(told + _STRIDE, stride)
    store64(told + _ALL, rows)
    done = _over_parts(frame, told, products, products * count * rows * columns)
    for p in range(products):
        if job_at(jobs + p * stride).refused == 0:
            served[p] = 1
    free(memory)
    return done


@njit(**OPTIONS)
def _floats(frame, spec, block, product):
    """One product in floats, the block being for all of them; 0, or an error."""
    count, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    x, which, out = load64(block + _X), load64(block + _WHICH), load64(block + _OUT)
    made = out + 4 * product * count * rows
    turned = made if count == 1 else malloc(4 * count * rows)
    if turned == 0:
        return error(frame, no_memory(), EXHAUSTED)
    store64(block + _X, x + 4 * product * count * columns)
    store64(block + _WHICH, which + 4 * product)
    store64(block + _OUT, turned)
    failed = run_few_rows(frame, spec, block, 1)
    if count != 1:
        if failed == 0:
            carray(floats(made), (count, rows))[:, :] = carray(floats(turned), (rows, count)).T
        free(turned)
    store64(block + _X, x)
    store64(block + _WHICH, which)
    store64(block + _OUT, out)
    return failed


@njit(**OPTIONS)
def run(frame, spec, block, products):
    """Compute `out` (P, M, N), of the block's operands; 0, or an error."""
    bits, group, kind = load64(spec + _BITS), load64(spec + _GROUP), load64(spec + _KIND)
    if load64(table() + 8 * _place(bits, group, kind, 16)) == 0:
        return error(frame, no_body(), INVALID)
    memory = malloc(products + 8)
    if memory == 0:
        return error(frame, no_memory(), EXHAUSTED)
    served = carray(bytes_at(memory), products)
    served[:] = 0
    enough, failed = True, 0
    if load64(spec + _WIDTH) == 8 and load64(table() + 8 * _place(bits, group, kind, 8)) != 0:
        enough = _integers(frame, spec, block, products, 8, served)
    if enough and served.sum() < products:
        enough = _integers(frame, spec, block, products, 16, served)
    if not enough:
        failed = error(frame, no_memory(), EXHAUSTED)
    for p in range(products):
        if failed == 0 and served[p] == 0:
            failed = _floats(frame, spec, block, p)
    free(memory)
    return failed


def install() -> None:
    """Put the task into the table."""
    TABLE[4] = _task.address


def load(scheme: Scheme, kind: int, width: int) -> None:
    """Compile the kernels of a scheme, or read them from the cache, and put them into the table."""
    place = _place.py_func(scheme.bits, scheme.group_size or 0, kind, width)
    found = integer.row_kernels(scheme, kind, width)
    TABLE[place + 2], TABLE[place + 1], TABLE[place] = found.step, found.kernel.address, found.rounder.address
