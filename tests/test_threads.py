"""Many threads, shared tensors, and a set of backends that changes under them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import quantcore as qc
from quantcore import BackendInfo, QuantizedTensor
from quantcore_backends.numpy_backend import NumPyBackend

Array = np.ndarray[Any, Any]

SECONDS = 1.2


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Let threads interrupt each other fifty times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


RNG = np.random.default_rng(0)


class Twin(NumPyBackend):
    """NumPy's backend under another name, so that every route gives the same result."""

    def __init__(self, name: str, priority: int, shape_dependent: bool = False) -> None:
        self.info = BackendInfo(
            api_version=1,
            name=name,
            library="numpy",
            array_types=("numpy:ndarray",),
            priority=priority,
            shape_dependent=shape_dependent,
        )

    @qc.hookimpl
    def backend_info(self) -> BackendInfo:
        return self.info


def together(workers: list[Callable[[], None]], enough: Callable[[], bool] = lambda: True) -> list[BaseException]:
    """Run the workers at once, each again and again for a while and until it is enough; what they raised."""
    raised: list[BaseException] = []
    stop = threading.Event()
    start = threading.Barrier(len(workers))

    def repeat(work: Callable[[], None]) -> None:
        start.wait()
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            raised.append(error)
            stop.set()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    patience = time.monotonic() + 60
    while not (stop.is_set() or enough()) and time.monotonic() < patience:
        stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return raised


def make() -> list[tuple[Array, QuantizedTensor, Array]]:
    """Shared operands of several kinds, with their products."""
    found = []
    for bits, group_size, dtype in [(4, 32, "float32"), (3, 64, "float16"), (8, "row", "float32"), (5, 16, "float32")]:
        w = RNG.standard_normal((24, 128)).astype(dtype)
        for qw in (
            qc.quantize(w, bits=bits, group_size=group_size),
            qc.quantize(w, bits=bits, group_size=group_size).mT,
        ):
            x = RNG.standard_normal((3, qw.shape[-1])).astype(np.float32)
            found.append((x, qw, x @ qw.dequantize(dtype="float32").T))
    return found


@pytest.mark.filterwarnings("ignore::quantcore.PerformanceWarning")
def test_eight_threads_while_plugins_come_and_go(spoil: pytest.MonkeyPatch) -> None:
    shared = make()
    counts = {"dot": 0, "named": 0, "gone": 0, "changes": 0, "others": 0}

    def dot() -> None:
        for x, qw, expected in shared:
            np.testing.assert_allclose(qc.dot(x, qw), expected, rtol=1e-4, atol=1e-3)
        counts["dot"] += 1

    def named() -> None:
        for x, qw, expected in shared:
            try:
                np.testing.assert_allclose(qc.dot(x, qw, backend="twin1"), expected, rtol=1e-4, atol=1e-3)
                counts["named"] += 1
            except qc.BackendNotFoundError:  # the one exception that is documented: it isn't there just now
                counts["gone"] += 1

    def others() -> None:
        for _, qw, _ in shared:
            dense = qw.dequantize()
            axis = 1 if qw.transposed else 0
            np.testing.assert_array_equal(qc.take(qw, [2, 0], axis=axis), np.take(dense, [2, 0], axis=axis))
            assert qc.explain("dequantize", qw).backend is not None
        with qc.use_precision("highest"):
            qc.quantize(np.ones((2, 64), np.float32))
        assert [r.name for r in qc.backends()].count("numpy") <= 1
        counts["others"] += 1

    def change() -> None:
        for number, backend in enumerate((Twin("twin1", 5), Twin("twin2", 50, shape_dependent=True))):
            qc.register(backend)
            time.sleep(0.001)
            if number:
                qc.unregister("twin1")
                qc.unregister("twin2")
        counts["changes"] += 1

    def reload() -> None:
        qc.unregister("numpy")
        time.sleep(0.001)
        qc.refresh()
        time.sleep(0.005)

    raised = together([dot, dot, dot, dot, named, others, change, reload], lambda: min(counts.values()) > 0)
    assert raised == []
    assert min(counts.values()) > 0, counts


def test_the_table_of_shapes_is_safe_when_it_overflows(spoil: pytest.MonkeyPatch) -> None:
    from quantcore import dispatch

    spoil.setattr(dispatch, "_MAX_SHAPES", 2)
    qc.register(Twin("twin", 5, shape_dependent=True))
    qw = qc.quantize(RNG.standard_normal((8, 64)).astype(np.float32))
    x = RNG.standard_normal((16, 64)).astype(np.float32)
    expected = qc.dot(x, qw)

    def work() -> None:
        for rows in range(1, 16):
            np.testing.assert_allclose(qc.dot(x[:rows], qw), expected[:rows], rtol=1e-5, atol=1e-5)

    assert together([work] * 8) == []


def test_first_use_in_many_threads_reads_the_entry_points_once(spoil: pytest.MonkeyPatch) -> None:
    from quantcore import registry

    qw = qc.quantize(np.ones((4, 64), np.float32))
    real = list(registry.entry_points(group=registry.ENTRY_POINT_GROUP))
    reads = []

    def entry_points(*, group: str) -> list[Any]:
        reads.append(group)
        time.sleep(0.05)
        return real

    spoil.setattr(registry, "entry_points", entry_points)
    spoil.setattr(registry, "_phase", "new")
    spoil.setattr(registry, "current", registry.Snapshot())
    results: list[Array] = []
    start = threading.Barrier(8)

    def first() -> None:
        start.wait()
        results.append(qc.dot(np.ones((2, 64), np.float32), qw))

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(reads) == 1


def test_a_warning_of_a_fallback_is_given_once_for_all_threads(spoil: pytest.MonkeyPatch) -> None:
    from quantcore import dispatch

    spoil.setattr(dispatch, "_warned", set())
    qw = qc.quantize(np.ones((4, 64), np.float32), group_size=32)

    class Refuses(Twin):
        @qc.hookimpl
        def supports(self, op: str, call: qc.Call) -> bool | str:
            return "no"

    qc.register(Refuses("refuses", 5))
    qc.unregister("numpy")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            thread = threading.Thread(target=qc.dot, args=(np.ones((2, 64), np.float32), qw))
            thread.start()
            thread.join()
    assert sum(issubclass(w.category, qc.PerformanceWarning) for w in told) == 1


MLX = """
import threading, time, warnings
import ml_dtypes, numpy as np, mlx.core as mx, quantcore as qc
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
w = rng.standard_normal((32, 128)).astype(np.float32)
x = rng.standard_normal((4, 128)).astype(np.float32)
raised = []

def in_a_thread(function):
    def guarded():
        try:
            made.append(function())
        except BaseException as error:
            raised.append(error)
    made = []
    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return made[0] if made else None

def makers():
    for group in (16, 32, "row"):
        yield lambda: qc.quantize(mx.array(w), group_size=group)
        yield lambda: qc.quantize(mx.array(w[:, :50]), group_size=group, pad=True, nonfinite="clip")
        yield lambda: qc.quantize(mx.array(w.T.copy()), group_size=16, axis=-2)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            yield lambda: qc.quantize(w.astype(dtype), group_size=group).to("mlx")

def use(qw):
    product = qc.dot(mx.array(x[:, : qw.shape[-1]]), qw)
    dense = np.asarray(qw.to("numpy").dequantize(dtype="float32"))
    np.testing.assert_allclose(np.asarray(product), x[:, : qw.shape[-1]] @ dense.T, rtol=1e-4, atol=1e-3)

for make in makers():
    use(in_a_thread(make))            # made in another thread, used in this one
    qw = make()
    in_a_thread(lambda: use(qw))      # and the other way round
assert raised == [], raised

shared = [make() for make in makers()]
end = time.monotonic() + 1

def work():
    try:
        while time.monotonic() < end:
            for qw in shared:
                use(qw)
    except BaseException as error:
        raised.append(error)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert raised == [], raised
print("fine")
"""


def test_mlx_tensors_are_shared_by_threads_that_make_their_own_x() -> None:
    done = subprocess.run([sys.executable, "-c", MLX], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


TOGETHER = """
import threading, time, warnings
import numpy as np, mlx.core as mx, torch, quantcore as qc
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
qn = qc.quantize(rng.standard_normal((256, 512)).astype(np.float32))
rows = [rng.standard_normal((m, 512)).astype(np.float32) for m in (1, 5, 40)]
wanted = [qc.dot(x, qn) for x in rows]
qm, qt = qn.to("mlx"), qn.to("torch")
threads_of_torch = torch.get_num_threads()
raised, done = [], []

def numpy_work():
    return [qc.dot(x, qn) for x in rows]

def mlx_work():
    return [np.asarray(qc.dot(mx.array(x), qm)) for x in rows]

def torch_work():
    inputs = [torch.from_numpy(x).requires_grad_() for x in rows]
    products = [qc.dot(x, qt) for x in inputs]
    sum(product.sum() for product in products).backward()
    dense = qt.dequantize().sum(dim=0)
    assert all(torch.allclose(x.grad, dense.expand_as(x), rtol=1e-3, atol=1e-3) for x in inputs)
    return [(x.detach() @ qt.dequantize().mT).numpy() for x in inputs] + [p.detach().numpy() for p in products]

end = time.monotonic() + 2

def work(function):
    try:
        while time.monotonic() < end:
            for i, result in enumerate(function()):
                assert ((result - wanted[i % 3]) ** 2).sum() <= 1e-8 * (wanted[i % 3] ** 2).sum()
            done.append(function)
    except BaseException as error:
        raised.append(error)

threads = [threading.Thread(target=work, args=(f,)) for f in (numpy_work, mlx_work, torch_work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert raised == [], raised
assert {numpy_work, mlx_work, torch_work} == set(done)
assert torch.get_num_threads() == threads_of_torch
print("fine")
"""


def test_tensors_of_several_libraries_leave_each_other_s_threads_alone() -> None:
    done = subprocess.run([sys.executable, "-c", TOGETHER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
