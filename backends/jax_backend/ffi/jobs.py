"""One go of a product with x rounded to integers: memory, the kernels' jobs in it, and whom integers don't serve.

What a kernel needs is worked out here from the shapes, not taken from the module: it depends on the processor.
"""

from typing import Final

from quantcore import Scheme
from quantcore_backends.cpu_kernels import integer, layout
from quantcore_backends.cpu_kernels.activations import run_length
from quantcore_backends.cpu_kernels.disk_cache import CACHED, INLINED, njit
from quantcore_backends.cpu_kernels.job import CALL, JOB, PLAN, job_at
from quantcore_backends.cpu_kernels.raw_memory import copy_bytes
from quantcore_backends.cpu_kernels.vectors import LANES
from quantcore_backends.jax_backend.ffi import parts
from quantcore_backends.jax_backend.ffi.block import in_block, in_spec
from quantcore_backends.jax_backend.ffi.bodies import chosen_weight
from quantcore_backends.jax_backend.ffi.frame import (
    FIRST_ROUNDED,
    KERNELS,
    TABLE,
    WIDEST,
    free,
    load64,
    malloc,
    store64,
    table,
)

__all__ = ["has_kernel", "load", "multiply"]

_KIND, _BITS, _GROUP = in_spec("kind", "bits", "group")
_X, _PACKED, _SCALES, _BIASES, _OUT = in_block("x", "packed", "scales", "biases", "out")
_COUNT, _ROWS, _COLUMNS, _ROW, _SCALE_ROW = in_block("count", "rows", "columns", "row", "scale_row")

_JOB_BYTES: Final = JOB.itemsize
_PLAN_AT: Final = 8 * len(CALL)
_SAFE, _COPY_ROW = PLAN.index("safe"), PLAN.index("copy_row")
_MOST_RUN: Final = run_length(None)
_THREADED: Final = integer.THREADED
_UNTILED_ROWS: Final = integer.UNTILED_ROWS
_FLOATS: Final = integer.FLOATS

_bound = njit(**CACHED)(layout.bound)
_of_few_rows = njit(**CACHED)(layout.of_few_rows)
_of_tiles = njit(**CACHED)(layout.of_tiles)
_places = njit(**CACHED)(layout.places)
_plan = njit(**CACHED)(layout.plan)
_together = njit(**CACHED)(layout.together)
_turns = njit(**CACHED)(layout.turns)


@njit(**INLINED)
def _entry(bits, group, width, together):
    """Where in the table kernels stand: rounder, kernel, and codes at a time or rows of a block.

    Of 24 bits and of floats there is one; of others for one row of x at a time, for tiles, and for two rows.
    """
    number = 0
    while group >> (4 + number):
        number += 1
    scheme = number * WIDEST + bits - 1
    others = 0 if width == 24 or together == 1 else 3 if together == 0 else 5
    kernel = KERNELS - 1 if width == _FLOATS else width // 8 - 1 + others
    return FIRST_ROUNDED + 3 * (scheme * KERNELS + kernel)


@njit(**INLINED)
def _kernels(spec, rows_of_x, width):
    """Address of what the table has for so many rows of x."""
    bits, group = load64(spec + _BITS), load64(spec + _GROUP)
    return table() + 8 * _entry(bits, group, width, _together(rows_of_x, _UNTILED_ROWS))


@njit(**INLINED)
def has_kernel(spec, block, width):
    """Whether there are kernels of that width for so many rows of x, and they are loaded."""
    count = load64(block + _COUNT)
    tiled = _together(count, _UNTILED_ROWS) == 0
    if width == (24 if tiled else _FLOATS):
        return False
    return load64(_kernels(spec, count, width)) != 0


@njit(**INLINED)
def _set_job(address, block, product, row, count, places, plan):
    """Write down one product of `count` rows of x, from `row` on; of what lies behind the job, `places` says where."""
    all_rows, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    packed_row, scale_row = load64(block + _ROW), load64(block + _SCALE_ROW)
    first, weight = product * all_rows + row, chosen_weight(block, product)
    job = job_at(address)
    job.x, job.x_row = load64(block + _X) + 4 * first * columns, 4 * columns
    job.out, job.rows = load64(block + _OUT) + 4 * first * rows, count
    job.codes, job.code_scales = address + places[0], address + places[1]
    job.sums, job.copy = address + places[2], address + places[3]
    job.packed = load64(block + _PACKED) + weight * rows * packed_row
    job.scales = load64(block + _SCALES) + weight * rows * scale_row
    job.biases, job.sum_factor = load64(block + _BIASES) + weight * rows * scale_row, 1
    for i in range(len(plan)):
        store64(address + _PLAN_AT + 8 * i, plan[i])


@njit(**INLINED)
def _copy_last_rows(job):
    """Copy rows of the weight to where there is memory behind them that a vector may read."""
    for n in range(job.safe, job.out_features):
        copy_bytes(job.copy + (n - job.safe) * job.copy_row, job.packed + n * job.packed_row, job.packed_row)


@njit(**CACHED)
def multiply(frame, spec, block, product, products, row, count, width, served):
    """Multiply `count` rows of x from `row` on, of `products` from `product` on, that aren't served yet.

    Marks those that integers of that width, or floats, serve. False without memory.
    """
    bits, group, kind = load64(spec + _BITS), load64(spec + _GROUP), load64(spec + _KIND)
    all_rows, rows, columns = load64(block + _COUNT), load64(block + _ROWS), load64(block + _COLUMNS)
    packed_row, scale_row = load64(block + _ROW), load64(block + _SCALE_ROW)
    entry = _kernels(spec, all_rows, width)
    rounder, kernel, number = load64(entry), load64(entry + 8), load64(entry + 16)
    groups = scale_row // (4 if kind == 0 else 2)
    run = min(group, _MOST_RUN) if group and width != _FLOATS else _MOST_RUN
    height = 0
    if width != 24 and _together(all_rows, _UNTILED_ROWS) == 0:
        height = number
        sizes = _of_tiles(count, columns, groups, bits, run, LANES, width, height)
    else:
        sizes = _of_few_rows(columns, groups, bits, group, run, number, LANES, width)
    shift, reads, codes, scales, sums, words, scratch = sizes
    of_weight = (rows, columns, packed_row // 4, groups, packed_row, scale_row, kind, bits, group)
    plan = _plan(*of_weight, run, shift, reads, codes, scales, sums, words, scratch, _bound(rows, width))
    copy = (rows - plan[_SAFE]) * plan[_COPY_ROW]
    places = _places(_JOB_BYTES, count, height, codes, scales, sums, copy)
    stride = places[4]
    threads = load64(table() + 16) if products * count * rows * columns >= _THREADED else 1
    memory = malloc(64 + parts.TOLD + products * stride + threads * scratch)
    if memory == 0:
        return False
    told = memory + 63 & -64
    jobs = told + parts.TOLD
    for p in range(products):
        _set_job(jobs + p * stride, block, product + p, row, count, places, plan)
        job = job_at(jobs + p * stride)
        job.scratch, job.refused = jobs + products * stride, served[p]
        if served[p] == 0:
            _copy_last_rows(job)
    rounded, whole, part = _turns(count, rows, height, LANES, threads)
    parts.set_jobs(told, jobs, stride, products)
    parts.set_rounding(told, rounder, count, rounded)
    parts.set_multiplying(told, kernel, whole, part)
    done = parts.run(frame, told, threads)
    for p in range(products):
        if job_at(jobs + p * stride).refused == 0:
            served[p] = 1
    free(memory)
    return done


def load(scheme: Scheme, width: int, together: int) -> None:
    """Compile the kernels of a scheme, or read them from the cache, and put them into the table.

    `together` is as of :func:`layout.together`.
    """
    found = integer.row_kernels(scheme, width, together) if together else integer.tile_kernels(scheme, width)
    place = _entry.py_func(scheme.bits, scheme.group_size or 0, width, together)
    TABLE[place + 2], TABLE[place + 1], TABLE[place] = found[2], found.kernel.address, found.rounder.address
