"""What a product needs beyond its result and one float32 copy of x: a bounded amount, however large the weight.

NumPy reports its buffers to tracemalloc, so the peaks are those of the arrays themselves.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcore as qc
from quantcore import QuantizedTensor, Scheme
from quantcore.memory import aligned, aligned_empty, freeze, is_frozen

MIB = 1 << 20
LIMIT = 64 * MIB
RNG = np.random.default_rng(0)


def packed(shape: tuple[int, ...], *, bits: int = 4, group_size: int | None = 64) -> QuantizedTensor:
    """A weight of random codes, made without ever being dense."""
    scheme = Scheme(bits=bits, group_size=group_size)
    words = RNG.integers(0, 1 << 32, scheme.packed_shape(shape), dtype=np.uint32)
    scales = np.full(scheme.scales_shape(shape), 0.01, np.float16)
    return qc.quantized_tensor(words, scales, scales * -7, shape, scheme, dtype="float32")


def peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes at the peak of the call, and its result."""
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def beyond(x: Any, qw: QuantizedTensor, **options: Any) -> int:
    """Bytes at the peak of dot beyond the result and one float32 copy of x."""
    peak, result = peak_of(lambda: qc.dot(x, qw, **options))
    size, itemsize = int(np.prod(result.shape)), np.from_dlpack(result).itemsize
    return peak - size * itemsize - 4 * int(np.prod(x.shape))


@pytest.fixture(scope="module")
def large() -> QuantizedTensor:
    """A gigabyte in float32, 128 MiB as it is."""
    return packed((32768, 8192))


def test_the_large_weight_is_large(large: QuantizedTensor) -> None:
    assert large.size * 4 == 1024 * MIB
    assert large.nbytes > 2 * LIMIT


@pytest.mark.parametrize("orientation", ["dot", "matmul"])
def test_a_large_weight_in_numpy(large: QuantizedTensor, orientation: str) -> None:
    qw = large if orientation == "dot" else large.mT
    x = RNG.standard_normal((1, qw.shape[-1])).astype(np.float32)
    assert beyond(x, qw, backend="numpy") < LIMIT


def test_arrays_that_begin_with_a_cache_line() -> None:
    whole = aligned_empty((4, 32), np.float32)
    whole[...] = np.arange(128, dtype=np.float32).reshape(4, 32)
    assert whole.ctypes.data % 64 == 0
    assert aligned(whole) is whole
    for part in (whole[:, 1:], whole.T, whole[1:, :0], whole.reshape(-1)[3:]):
        copy = aligned(part)
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % 64 == 0
        np.testing.assert_array_equal(copy, part)


def test_large_results_begin_with_a_cache_line() -> None:
    """So that JAX takes them without a copy."""
    qw = packed((512, 256))
    for rows in (20, 200):
        assert qc.dot(np.ones((rows, 256), np.float32), qw).ctypes.data % 64 == 0
    assert qw.dequantize().ctypes.data % 64 == 0


CASES = [
    pytest.param((64, 1 << 20), 4, 64, False, 2, id="very long rows"),
    pytest.param((64, 1 << 20), 4, 64, True, 2, id="very long rows, ungrouped"),
    pytest.param((4, 1 << 22), 4, None, False, 1, id="one group of four million"),
    pytest.param((1 << 18, 64), 8, 32, False, 4, id="very many rows"),
    pytest.param((1 << 18, 64), 8, 32, True, 4, id="very many rows, ungrouped"),
    pytest.param((8192, 4096), 3, 128, False, 8, id="3 bits"),
    pytest.param((8192, 4096), 6, 16, True, 8, id="6 bits, ungrouped"),
    pytest.param((8192, 256), 4, 64, False, 4096, id="many rows of x, short ones"),
    pytest.param((512, 8192), 4, 64, True, 4096, id="many rows of x, ungrouped"),
    pytest.param((512, 2048), 4, 64, False, 8192, id="more rows of x"),
]


@pytest.mark.parametrize(("shape", "bits", "group_size", "flip", "rows"), CASES)
def test_numpy(shape: tuple[int, ...], bits: int, group_size: int | None, flip: bool, rows: int) -> None:
    qw = packed(shape, bits=bits, group_size=group_size)
    qw = qw.mT if flip else qw
    x = np.ones((rows, qw.shape[-1]), np.float32)
    assert beyond(x, qw, backend="numpy") < LIMIT


def test_numpy_float64_and_half() -> None:
    qw = packed((4096, 2048))
    for dtype in (np.float16, np.float64):
        x = np.ones((1024, 2048), dtype)
        copy = 4 * x.size if dtype == np.float64 else 0  # the copy is in float64 then
        assert beyond(x, qw, backend="numpy") - copy < LIMIT


def test_numpy_stacks(large: QuantizedTensor) -> None:
    leaves, rebuild = large.flatten()
    stack = rebuild([leaf.reshape(16, 2048, -1) for leaf in leaves])
    x = np.ones((1, stack.shape[-1]), np.float32)
    assert beyond(x, stack, backend="numpy") < LIMIT
    peak, result = peak_of(lambda: qc.gather_dot(x, stack, rhs_indices=[3, 3, 0, 15]))
    assert result.shape == (4, 1, 2048)
    assert peak < LIMIT


def test_take_unpacks_no_more_than_it_gives() -> None:
    table = packed((1 << 17, 1024))
    peak, rows = peak_of(lambda: qc.take(table, [5, 77, 131071]))
    assert rows.shape == (3, 1024)
    assert peak < MIB


def test_quantize_and_dequantize_work_in_tiles() -> None:
    w = RNG.standard_normal((2048, 4096)).astype(np.float32)
    peak, qw = peak_of(lambda: qc.quantize(w))
    assert peak - qw.nbytes < LIMIT
    peak, dense = peak_of(qw.dequantize)
    assert peak - dense.nbytes < LIMIT


@pytest.mark.parametrize(
    ("shape", "bits", "flip"),
    [((8192, 8192), 4, False), ((8192, 8192), 4, True), ((4096, 4096), 3, False), ((32, 1 << 20), 4, False)],
    ids=["grouped", "ungrouped", "3 bits", "very long rows"],
)
def test_array_api(shape: tuple[int, ...], bits: int, flip: bool, libraries: dict[str, Any]) -> None:
    qw = packed(shape, bits=bits)
    leaves, rebuild = qw.flatten()
    qw = rebuild([leaves[0], *(leaf.astype(np.float32) for leaf in leaves[1:])]).to("array_api_strict")
    qw = qw.mT if flip else qw
    x = libraries["array_api_strict"].array(np.ones((1, qw.shape[-1]), np.float32))
    assert beyond(x, qw, backend="array_api") < LIMIT


def test_array_api_on_numpy_arrays(large: QuantizedTensor) -> None:
    x = np.ones((1, large.shape[-1]), np.float32)
    assert beyond(x, large[:4096], backend="array_api") < LIMIT


def test_frozen_is_what_nobody_can_write_to(tmp_path: Path) -> None:
    array = np.zeros((4, 4), np.float32)
    view = array[1:]
    view.flags.writeable = False
    assert not is_frozen(view)
    freeze(view)
    assert is_frozen(view)
    assert is_frozen(array)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1

    memory = bytearray(16)
    of_bytearray = np.frombuffer(memory, np.uint8)
    of_bytearray.flags.writeable = False
    assert not is_frozen(of_bytearray)
    assert is_frozen(np.frombuffer(bytes(memory), np.uint8))
    assert not is_frozen(np.frombuffer(memoryview(memory).toreadonly(), np.uint8))
    assert not is_frozen(np.frombuffer(memoryview(np.zeros(4, np.uint8)).toreadonly(), np.uint8))
    assert is_frozen(np.frombuffer(memoryview(bytes(memory))[2:], np.uint8))

    path = tmp_path / "mapped"
    path.write_bytes(memory)
    assert is_frozen(np.memmap(path, np.uint8, "r"))
    assert not is_frozen(np.memmap(path, np.uint8, "r+"))
    writable = np.memmap(path, np.uint8, "r+")[2:]
    writable.flags.writeable = False
    assert not is_frozen(writable)
