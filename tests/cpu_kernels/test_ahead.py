"""What workers prefetch while they wait: the weights that are expected next, each piece by one of them, and no more."""

import ctypes
import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import quantcore as qc
from quantcore_backends.cpu_kernels import ahead, products
from quantcore_backends.cpu_kernels.threads import native_pool

PIECE = 4096
NOWHERE = itertools.count(1 << 40, 1 << 30)  # addresses at which nothing is


def slot(pieces: int, scale_pieces: int = 1) -> int:
    place, scales = next(NOWHERE), scale_pieces * PIECE
    return ahead.slot_of((place, pieces * PIECE), (place, scales), (place, scales))


def words(address: int) -> list[int]:
    """The words of a slot."""
    number = (address - ahead._table.ctypes.data) // ahead._table.strides[0]
    return [int(word) for word in ahead._table[number]]


def following(address: int) -> int:
    return words(address)[6]


def multiplied(*slots: int) -> None:
    for last, weight in itertools.pairwise(slots):
        ahead.learn(last, weight)


class Worker:
    """The place of a worker, and what it does there."""

    def __init__(self, number: int = 0, of: int = 1) -> None:
        self.number, self.of = number, of
        self.place = np.zeros(8, np.int64)

    def after(self, weight: int) -> int:
        """Prefetch as far as may be after a product with a weight; how many pieces that took."""
        ahead.go_on(self.place.ctypes.data, weight)
        pieces = 0
        while ahead.bring_near(self.place.ctypes.data, self.number, self.of):
            pieces += 1
            assert pieces < 10_000
        return pieces


def test_a_weight_is_expected_once_it_came_twice_and_forgotten_once_another_did() -> None:
    one, two, three = slot(1), slot(1), slot(1)
    multiplied(one, two)
    assert following(one) == 0
    multiplied(one, two)
    assert following(one) == two
    multiplied(one, three)
    assert following(one) == 0
    multiplied(0, one)
    multiplied(one, 0)
    assert following(one) == 0


def test_weights_are_followed_as_far_as_the_cache_reaches() -> None:
    small = [slot(3) for _ in range(4)]
    multiplied(*small, *small, small[0])
    worker = Worker()
    assert worker.after(small[0]) == ahead._MOST_AHEAD // PIECE
    assert worker.after(small[1]) <= 6  # the rest is near already: as much as was used up


def test_who_is_wrong_begins_anew() -> None:
    one, two, three, four = (slot(2) for _ in range(4))
    multiplied(one, two, one, two)
    multiplied(three, four, three, four)
    worker = Worker()
    assert worker.after(one) > 0
    ahead.go_on(worker.place.ctypes.data, three)
    assert worker.place[0] == four
    assert worker.place[1] == worker.place[2] == 0


def test_nothing_is_brought_where_nothing_is_expected() -> None:
    assert Worker().after(slot(5)) == 0


def store(address: int, value: int) -> None:
    ctypes.c_int64.from_address(address).value = value


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_in_the_pieces(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    # In plain Python, so that what is prefetched can be seen.
    monkeypatch.setattr(ahead, "load_word", lambda address: ctypes.c_int64.from_address(address).value)
    monkeypatch.setattr(ahead, "store_word", store)
    monkeypatch.setattr(ahead, "_prefetch_piece", lambda weight, piece: taken.append(piece) or piece < 7)
    one, two = slot(5), slot(5)
    multiplied(one, two, one, two)
    multiplied(two, slot(1))
    for number in range(workers):
        place = np.zeros(8, np.int64)
        ahead.go_on.py_func(place.ctypes.data, one)
        while ahead.bring_near.py_func(place.ctypes.data, number, workers):
            pass
    assert sorted(piece for piece in taken if piece < 7) == list(range(7))


def test_products_teach_the_pool_and_outlive_their_weights() -> None:
    if native_pool().threads == 1:
        pytest.skip("one thread: there are no workers")
    rng = np.random.default_rng(0)
    dense = [rng.standard_normal((1024, 512)).astype(np.float32) for _ in range(3)]
    weights = [qc.quantize(each) for each in dense]
    x = rng.standard_normal((1, 512)).astype(np.float32)
    expected = [qc.dot(x, each) for each in weights]
    for _ in range(3):
        for each, result in zip(weights, expected, strict=True):
            np.testing.assert_array_equal(qc.dot(x, each), result)
    slots = [products._weights[id(each)][1].slot for each in weights]
    assert [following(each) for each in slots] == [*slots[1:], slots[0]]
    del weights[1:]
    gc.collect()
    for _ in range(3):
        np.testing.assert_array_equal(qc.dot(x, weights[0]), expected[0])


def test_a_weight_keeps_its_slot_until_all_were_given() -> None:
    what = [(next(NOWHERE), PIECE) for _ in range(3)]
    first = ahead.slot_of(*what)
    assert ahead.slot_of(*what) == first
    others = {slot(1) for _ in range(len(ahead._table) - 1)}
    assert len(others) == len(ahead._table) - 1
    assert first not in others
    assert slot(1) == first
    assert ahead.slot_of(*what) != first
    assert len(ahead._given) == len(ahead._table)


def test_what_is_brought_with_each_run_is_the_whole_tile() -> None:
    job = SimpleNamespace(packed=1 << 20, scales=1 << 30, biases=1 << 31, packed_row=512, scale_row=64)
    whole = ahead.tile_ahead.py_func(job, 32, 16, 0, 16)
    assert whole == (job.packed + 32 * 512, job.scales + 32 * 64, job.biases + 32 * 64, 512, 64)
    assert 16 * whole.codes_step == 16 * job.packed_row
    assert 16 * whole.scales_step == 16 * job.scale_row
    later = ahead.tile_ahead.py_func(job, 32, 16, 5, 16)
    assert later.codes == whole.codes + 5 * whole.codes_step
    assert later.biases - whole.biases == later.scales - whole.scales == 5 * whole.scales_step
    assert ahead.tile_ahead.py_func(job, 0, 16, 0, 0)[3:] == (16 * 512, 16 * 64)
