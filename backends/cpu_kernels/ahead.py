"""Weights brought near before they are asked for: the rest of one that is multiplied, and those that come after it.

A model multiplies by its weights in the same order again and again, and between two products memory has nothing to do.
So each weight has a slot in a table, which says where it lies and which weight came after it, the last two times. A
worker without work follows these and prefetches. A wrong guess costs bandwidth only: nothing is read, and to prefetch
memory that isn't there does nothing.
"""

import itertools
from typing import Final, NamedTuple

import numpy as np

from quantcore_backends.cpu_kernels.atomics import load_word, store_word
from quantcore_backends.cpu_kernels.disk_cache import CACHED, COMPILED, njit
from quantcore_backends.cpu_kernels.simd import prefetch

__all__ = ["NOTHING", "Ahead", "bring_near", "go_on", "learn", "prefetch_lines", "rows_ahead", "slot_of", "tile_ahead"]

_LINE: Final = 64
_STREAM: Final = 32768
"""Bytes of a weight, at least, between what few rows of x are multiplied by and what is prefetched."""
_BYTES: Final = 4096
_MOST_AHEAD: Final = 1 << 20
"""Bytes brought near before they are needed: of more, a core's own cache would lose the first."""

_SLOTS: Final = 4096
"""After so many weights, slots are given anew. Whose slot was taken is guessed wrong, once or twice."""
_PACKED, _PACKED_BYTES, _SCALES, _SCALE_BYTES, _BIASES, _BIAS_BYTES, _NEXT, _CANDIDATE = range(0, 64, 8)
_SIZE: Final = 8
"""From where an array's address stands to where its bytes do."""
_AT, _PIECE, _AHEAD, _EXPECTED = range(0, 32, 8)
_table: Final = np.zeros((_SLOTS, 8), np.int64)
_numbers: Final = itertools.count()
_said: Final[list[tuple[int, ...]]] = [()] * _SLOTS
_given: Final[dict[tuple[int, ...], int]] = {}
"""Addresses of slots by what is said in them."""


@njit(forceinline=True, **COMPILED)
def prefetch_lines(address, size):
    """Begin to bring `size` bytes near.

    What several rows of a weight need is best prefetched as if it were one row: the hardware then sees one stream
    through the weight, and keeps more lines under way than are asked for here.
    """
    for line in range(0, size, _LINE):
        prefetch(address + line)


@njit(forceinline=True, **COMPILED)
def rows_ahead(job):
    """How many rows lie, in whole blocks of four, between those that are multiplied and those that are prefetched."""
    four = 4 * job.packed_row
    return 4 * max(1, (_STREAM + four - 1) // four)


class Ahead(NamedTuple):
    """Addresses of what is brought near while runs are multiplied; and bytes of it that go with each, none for 0."""

    codes: int
    scales: int
    biases: int
    codes_step: int
    scales_step: int


NOTHING: Final = Ahead(0, 0, 0, 0, 0)


@njit(forceinline=True, **COMPILED)
def tile_ahead(job, n, rows, run, runs):
    """So many rows of the weight from `n` on, which follow one another: what is left of them from a run of all on.

    They are brought near as fast as the rows before them are multiplied. All at once they would wait for each other,
    and what is needed now behind them.
    """
    codes, scales = rows * job.packed_row // max(1, runs), rows * job.scale_row // max(1, runs)
    at, beside = n * job.packed_row + run * codes, n * job.scale_row + run * scales
    return Ahead(job.packed + at, job.scales + beside, job.biases + beside, codes, scales)


def slot_of(packed: tuple[int, int], scales: tuple[int, int], biases: tuple[int, int]) -> int:
    """Address of the slot for a weight whose arrays lie at these addresses and have so many bytes that are read."""
    what = *packed, *scales, *biases
    found = _given.get(what)
    if found is not None:
        return found
    # No step here needs a lock: of two threads at once, one may get a slot that is forgotten early.
    number = next(_numbers) % _SLOTS
    _given.pop(_said[number], None)
    _said[number] = what
    _table[number] = *what, 0, 0
    address = _given[what] = _table.ctypes.data + number * _table.strides[0]
    return address


@njit(**CACHED)
def learn(last, weight):
    """Note that one weight came after another; it is expected there once that was so twice."""
    if last == 0 or weight == 0:
        return
    if load_word(last + _CANDIDATE) != weight:
        store_word(last + _CANDIDATE, weight)
        store_word(last + _NEXT, 0)
    elif load_word(last + _NEXT) != weight:
        store_word(last + _NEXT, weight)


@njit(**CACHED)
def _prefetch_piece(weight, piece):
    """Prefetch a piece of a weight, or say that it hasn't so many."""
    for array in (_PACKED, _SCALES, _BIASES):
        start, size = load_word(weight + array), load_word(weight + array + _SIZE)
        pieces = (size + _BYTES - 1) // _BYTES
        if piece < pieces:
            prefetch_lines(start + piece * _BYTES, min(size - piece * _BYTES, _BYTES))
            return True
        piece -= pieces
    return False


@njit(**CACHED)
def go_on(place, weight):
    """Take note that the product with `weight` is done.

    `place` is the address of four words in which a worker keeps the slot and the piece that it prefetches next, the
    bytes that it is ahead, and the slot that it expects.
    """
    following = load_word(weight + _NEXT)
    if load_word(place + _EXPECTED) == weight and load_word(place + _AT) != weight:
        done = load_word(weight + _PACKED_BYTES) + load_word(weight + _SCALE_BYTES) + load_word(weight + _BIAS_BYTES)
        store_word(place + _AHEAD, load_word(place + _AHEAD) - done)
    else:
        store_word(place + _AT, following)
        store_word(place + _PIECE, 0)
        store_word(place + _AHEAD, 0)
    store_word(place + _EXPECTED, following)


@njit(**CACHED)
def bring_near(place, worker, workers):
    """Prefetch the next piece that is a worker's, of all `workers`; whether it isn't far enough ahead."""
    weight, piece, ahead = load_word(place + _AT), load_word(place + _PIECE), load_word(place + _AHEAD)
    if weight == 0 or ahead >= _MOST_AHEAD:
        return False
    if not _prefetch_piece(weight, piece + worker):
        store_word(place + _AT, load_word(weight + _NEXT))
        piece = -workers
    store_word(place + _PIECE, piece + workers)
    store_word(place + _AHEAD, ahead + workers * _BYTES)
    return True
