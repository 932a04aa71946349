"""Products with x as integers keep the bound of their precision, or are refused; on each target the code is its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcore as qc
from quantcore import Scheme
from quantcore.scheme import BITS
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import integer, kernels_unpacked, products

Array = np.ndarray[Any, Any]
BOUND = {integer.FLOATS: 1e-12, 24: 1e-12, 16: 1e-8, 8: 1e-4}
SCHEMES = [s for bits in BITS for group in (16, 64, 256, None) if integer.serves(s := Scheme("affine", bits, group))]


def weight(rows: int, columns: int, scheme: Scheme, dtype: Any = np.float32) -> qc.QuantizedTensor:
    rng = np.random.default_rng(rows * columns + scheme.bits)
    return qc.quantize(rng.standard_normal((rows, columns)).astype(dtype), scheme, pad=True)


def operand(qw: qc.QuantizedTensor) -> integer.Weight:
    return integer.Weight.of(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)


def product(x: Array, w: integer.Weight, width: int) -> Array | None:
    """The product, or None where integers of that width don't serve."""
    out = np.empty((x.shape[0], w.geometry.rows), np.float32)
    return out if integer.multiply(x, x.shape[0], w, out, width) else None


def error(result: Array, x: Array, qw: qc.QuantizedTensor) -> float:
    exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, qw.in_features)
    truth = oracle.product(x, exact)
    return oracle.nmse(result - truth, truth, x, exact)


def widths(scheme: Scheme, rows_of_x: int) -> tuple[int, ...]:
    few = rows_of_x <= integer.UNTILED_ROWS
    served = {integer.FLOATS: not few, 24: few and integer.has_wide(scheme), 16: True, 8: integer.has_byte_dot(scheme)}
    return tuple(width for width, serves in served.items() if serves)


def each_width(scheme: Scheme, *rows: int) -> Iterator[tuple[int, int]]:
    """Numbers of rows of x with the widths that there are for them."""
    return ((rows_of_x, width) for rows_of_x in rows for width in widths(scheme, rows_of_x))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_is_within_the_bound(scheme: Scheme) -> None:
    for rows, columns in ((1, 16), (6, 264), (35, 1031), (129, 72)):
        qw = weight(rows, columns, scheme)
        for rows_of_x in (1, 2, 3, 5, 10):
            x = np.random.default_rng(rows_of_x).standard_normal((rows_of_x, columns)).astype(np.float32) + 1
            for width in widths(scheme, rows_of_x):
                result = product(x, operand(qw), width)
                if result is None:
                    assert rows < 129  # of few outputs one may be off by many times what is expected
                    continue
                assert result.shape == (rows_of_x, rows)
                assert error(result, x, qw) <= BOUND[width]


@pytest.mark.parametrize("width", [integer.FLOATS, 16])
def test_more_of_x_than_the_caches_hold_gives_the_same(width: int) -> None:
    qw = weight(150, 2200, Scheme("affine", 4, 64))
    x = np.random.default_rng(0).standard_normal((integer.MOST, 2200)).astype(np.float32)
    assert 2 * x.size > kernels_unpacked._NEAR  # bytes, at two an element
    whole = product(x, operand(qw), width)
    parts = [product(part, operand(qw), width) for part in np.split(x, 4)]
    assert whole is not None
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 4])
def test_scales_of_half_precision(bits: int, dtype: Any) -> None:
    for scheme in (Scheme("affine", bits, 32), Scheme("affine", bits, 128)):
        qw = weight(21, 520, scheme, dtype)
        for rows_of_x, width in each_width(scheme, 2, 7):
            if width == 8:
                continue
            x = np.random.default_rng(0).standard_normal((rows_of_x, 520)).astype(np.float32)
            result = product(x, operand(qw), width)
            assert result is not None
            assert error(result, x, qw) <= BOUND[width]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_terms_that_nearly_cancel_stay_exact(bits: int, group: int) -> None:
    """Of a constant x and a weight of few elements that aren't 0, the codes' part and the biases' all but cancel."""
    scheme, rng = Scheme("affine", bits, group), np.random.default_rng(group)
    dense = np.zeros((128, 4096), np.float32)
    for row in dense:
        row[np.arange(0, 4096, group) + rng.integers(0, group, 4096 // group)] = -1
    qw = qc.quantize(dense, scheme)
    constant = np.full((1, 4096), 1.2345, np.float32)
    changing = np.where(np.arange(4096) < 2048, constant, -constant)
    several = np.concatenate([constant, changing]) * np.float32(1e10)
    for x in (constant, changing, several, np.repeat(several, 3, axis=0)):
        width = integer.FLOATS if len(x) > integer.UNTILED_ROWS else 24
        if width in widths(scheme, len(x)):
            result = product(x, operand(qw), width)
            assert result is not None
            assert error(result, x, qw) <= 2e-13


def test_highest_takes_integers_for_few_rows_and_tiles_of_floats_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    qw = weight(129, 264, Scheme("affine", 4, 64))
    taken = []
    real = integer.multiply
    monkeypatch.setattr(integer, "multiply", lambda *args: taken.append(args[-1]) or real(*args))
    for rows_of_x in (1, integer.UNTILED_ROWS, integer.UNTILED_ROWS + 1, 33):
        x = np.random.default_rng(0).standard_normal((rows_of_x, 264)).astype(np.float32)
        assert error(qc.dot(x, qw, precision="highest"), x, qw) <= BOUND[24]
    assert taken == [24, 24][: 2 * integer.has_wide(qw.scheme)] + [integer.FLOATS] * 2


def test_many_rows_go_in_parts() -> None:
    qw = weight(40, 128, Scheme("affine", 4, 64))
    x = np.random.default_rng(0).standard_normal((1030, 128)).astype(np.float32)
    result = product(x, operand(qw), 16)
    assert result is not None
    assert error(result, x, qw) <= BOUND[16]


@pytest.mark.parametrize("rows_of_x", [1, 6])
@pytest.mark.parametrize("precision", ["highest", "default", "fast"])
@pytest.mark.parametrize("case", ["outlier", "subnormal", "tiny", "huge", "zero", "one"])
def test_x_that_integers_do_not_serve(case: str, precision: str, rows_of_x: int) -> None:
    qw = weight(9, 512, Scheme("affine", 4, 64))
    x = np.random.default_rng(0).standard_normal((rows_of_x, 512)).astype(np.float32)
    x[-1] = {
        "outlier": np.where(np.arange(512) % 97 == 5, 1000 * x[-1], x[-1]),
        "subnormal": x[-1] * np.float32(1e-40),
        "tiny": x[-1] * np.float32(1e-25),
        "huge": x[-1] * np.float32(1e30),
        "zero": 0 * x[-1],
        "one": np.where(np.arange(512) == 70, np.float32(3), np.float32(0)),
    }[case]
    result = qc.dot(x, qw, precision=precision)
    fewer_digits = 10 if (case, precision) == ("subnormal", "highest") else 1  # of the sums in float32
    assert error(result, x, qw) <= fewer_digits * oracle.BOUNDS[precision]


@pytest.mark.parametrize("rows_of_x", [1, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float, rows_of_x: int) -> None:
    qw = weight(9, 512, Scheme("affine", 4, 64))
    x = np.ones((rows_of_x, 512), np.float32)
    x[0, 200] = value
    for width in widths(qw.scheme, rows_of_x):
        assert product(x, operand(qw), width) is None
    for precision in oracle.BOUNDS:
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(qc.dot(x, qw, precision=precision))
            np.testing.assert_array_equal(finite, np.isfinite(x @ qw.dequantize().T))


@pytest.mark.parametrize("exponent", [-125, -110, 60, 100])
def test_weights_that_are_tiny_or_huge(exponent: int) -> None:
    qw = weight(129, 512, Scheme("affine", 4, 64))
    scales, biases = qw.scales * np.float32(2.0**exponent), qw.biases * np.float32(2.0**exponent)
    changed = qc.quantized_tensor(qw.packed, scales, biases, qw.shape, qw.scheme)
    for rows_of_x, width in each_width(qw.scheme, 1, 2, 6):
        x = np.random.default_rng(0).standard_normal((rows_of_x, 512)).astype(np.float32)
        result = product(x, operand(changed), width)
        assert result is not None
        assert error(result, x, changed) <= BOUND[width]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_where_a_weight_lies_changes_nothing(bits: int) -> None:
    qw = weight(100, 1024, Scheme("affine", bits, 64))

    def placed(array: Array, offset: int) -> Array:
        """A copy that begins so many bytes behind the start of a cache line."""
        memory = np.empty(array.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    for rows_of_x, width in each_width(qw.scheme, 1, 2, 9):
        x = np.random.default_rng(0).standard_normal((rows_of_x, 1024)).astype(np.float32)
        expected = product(x, operand(qw), width)
        assert expected is not None
        for offset in (0, 1, 4, 20, 60):
            leaves = (placed(leaf, offset) for leaf in (qw.packed, qw.scales, qw.biases))
            moved = integer.Weight.of(*leaves, qw.scheme, qw.in_features)
            np.testing.assert_array_equal(product(x, moved, width), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_quantized_arrays_begin_with_a_cache_line(dtype: Any) -> None:
    qw = weight(300, 1024, Scheme("affine", 4, 64), dtype)
    assert [leaf.ctypes.data % 64 for leaf in (qw.packed, qw.scales, qw.biases)] == [0, 0, 0]


def test_scales_that_are_not_finite_are_refused() -> None:
    qw = weight(9, 512, Scheme("affine", 4, 64))
    scales = qw.scales.copy()
    scales[4, 2] = np.inf
    changed = qc.quantized_tensor(qw.packed, scales, qw.biases, qw.shape, qw.scheme)
    for rows_of_x, width in each_width(qw.scheme, 1, 6):
        assert product(np.ones((rows_of_x, 512), np.float32), operand(changed), width) is None


def test_weight_is_not_copied_and_forgotten_with_its_tensor() -> None:
    qw = weight(64, 512, Scheme("affine", 4, 64))
    qc.dot(np.ones((1, 512), np.float32), qw)
    kept = products._weights[id(qw)][1]
    assert kept.addresses == tuple(part.ctypes.data for part in (qw.packed, qw.scales, qw.biases))
    key = id(qw)
    del qw
    assert key not in products._weights


def test_arrays_that_are_copied_are_read_anew() -> None:
    rng = np.random.default_rng(0)
    made = qc.quantize(rng.standard_normal((32, 128)).astype(np.float32))
    x = rng.standard_normal((2, 128)).astype(np.float32)
    swapped = made.scales.dtype.newbyteorder()
    for packed, scales, biases in (
        (np.asfortranarray(made.packed), made.scales.copy(), made.biases.copy()),
        (made.packed[::-1].copy()[::-1], made.scales.copy(), made.biases.copy()),
        (made.packed.copy(), made.scales.astype(np.float64), made.biases.copy()),
        (made.packed.copy(), made.scales.astype(swapped), made.biases.astype(swapped)),
    ):
        qw = qc.quantized_tensor(packed, scales, biases, (32, 128), made.scheme, dtype="float32")
        np.testing.assert_allclose(qc.dot(x, qw), qc.dot(x, made), rtol=1e-5)
        assert id(qw) not in products._weights
        scales *= 2
        biases *= 2
        np.testing.assert_allclose(qc.dot(x, qw), 2 * qc.dot(x, made), rtol=1e-5)
        packed[...] = 0
        np.testing.assert_allclose(qc.dot(x, qw), x @ qw.dequantize().T, rtol=1e-3, atol=1e-3)


_ASSEMBLY = """
import json, platform, sys
machine, triple, cpu, features = sys.argv[1:]
platform.machine = lambda: machine
import llvmlite.binding as llvm
from llvmlite import ir
from quantcore_backends.cpu_kernels import simd_int
from quantcore_backends.cpu_kernels.vectors import LANES, QWORD, write
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
found = {}
for width in (24, 16, 8):
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [QWORD] * 3), "sums")
    builder = ir.IRBuilder(function.append_basic_block())
    write(builder, function.args[2], simd_int.chunk_sums(builder, *function.args[:2], 4, width, 1))
    builder.ret_void()
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    text = target.emit_assembly(llvm.parse_assembly(str(module)))
    found[width] = sorted({line.split()[0].removeprefix("{vex}") or line.split()[1]
                           for line in text.splitlines() if line.startswith("\\t") and not line.startswith("\\t.")})
print(json.dumps([LANES, found]))
"""


@pytest.mark.parametrize(
    ("machine", "triple", "cpu", "features", "lanes", "default", "fast"),
    [
        ("aarch64", "aarch64-linux-gnu", "neoverse-n1", "+neon,+dotprod", 8, "sdot", "sdot"),
        ("arm64", "arm64-apple-darwin", "apple-m1", "+neon,+dotprod", 8, "sdot", "sdot"),
        ("x86_64", "x86_64-linux-gnu", "haswell", "+avx2,+fma", 8, "vpmaddwd", "vpmaddubsw"),
        ("x86_64", "x86_64-linux-gnu", "alderlake", "+avx2,+fma,+avxvnni", 8, "vpdpbusd", "vpdpbusd"),
        (
            "x86_64",
            "x86_64-linux-gnu",
            "icelake-server",
            "+avx512f,+avx512bw,+avx512vl,+avx512vnni,+avx512vbmi",
            16,
            "vpdpbusd",
            "vpdpbusd",
        ),
    ],
)
def test_instructions_of_other_targets(
    machine: str, triple: str, cpu: str, features: str, lanes: int, default: str, fast: str
) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-c", _ASSEMBLY, machine, triple, cpu, features]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    width, found = json.loads(done.stdout)
    assert width == lanes
    for activation, wanted in (("24", fast), ("16", default), ("8", fast)):
        assert any(name.split(".")[0] == wanted for name in found[activation]), found


_OTHER = """
import numpy as np, quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import vectors
for bits, group in SCHEMES:
    rng = np.random.default_rng(bits)
    qw = qc.quantize(rng.standard_normal((19, 328)).astype(np.float32), bits=bits, group_size=group, pad=True)
    exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, 328)
    for rows in (1, 2, 6):
        x = rng.standard_normal((rows, 328)).astype(np.float32)
        truth = oracle.product(x, exact)
        for precision, bound in (("highest", 1e-12), ("default", 1e-8), ("fast", 1e-4)):
            result = qc.dot(x, qw, precision=precision)
            assert oracle.nmse(result - truth, truth, x, exact) <= bound, (bits, group, rows, precision)
print(vectors.LANES)
"""

_AVX2 = "+avx2,+fma,+f16c,+avx"
_OTHERS = [(1, 32), (2, 64), (3, 16), (5, 128), (8, 32)]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86's features")
@pytest.mark.parametrize(
    ("features", "schemes"),
    [
        ("", [(4, 64)]),
        (_AVX2, [(3, 16), (4, 64)]),
        pytest.param("", _OTHERS, marks=pytest.mark.slow),
        pytest.param("+sse4.2,+ssse3,+popcnt", [(4, 64), *_OTHERS], marks=pytest.mark.slow),
        pytest.param(_AVX2, _OTHERS, marks=pytest.mark.slow),
    ],
)
def test_lesser_targets_keep_the_bounds(features: str, schemes: Any, tmp_path: Any) -> None:
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    code = _OTHER.replace("SCHEMES", repr(schemes))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr[-2000:]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86's features")
@pytest.mark.parametrize(
    "schemes", [[(4, 64)], pytest.param([(2, 64), (3, 32), (4, None), (8, 32)], marks=pytest.mark.slow)], ids=str
)
def test_vectors_of_16_lanes_without_a_dot_of_bytes_keep_the_bounds(
    schemes: Any, split: Callable[..., str], tmp_path: Any
) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    code = split() + _OTHER.replace("SCHEMES", repr(schemes))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "16\n", done.stderr[-2000:]


@pytest.mark.parametrize("rows", [integer.MOST + 1, integer.MOST + 4, 2 * integer.MOST + 3])
def test_rows_left_over_are_multiplied_as_the_others(rows: int) -> None:
    rng = np.random.default_rng(rows)
    for scheme in ("affine-int4-g64", "affine-int3-g32", "affine-int8-row"):
        qw = qc.quantize(rng.standard_normal((40, 128)).astype(np.float32), scheme)
        exact = oracle.exact_weight(*qw.flatten()[0], qw.scheme, 128)
        x = rng.standard_normal((rows, 128)).astype(np.float32)
        for outlier in (1, 1e6):
            x[rows // 2, 5] *= outlier
            truth = oracle.product(x, exact)
            for precision, bound in oracle.BOUNDS.items():
                result = qc.dot(x, qw, precision=precision)
                assert oracle.nmse(result - truth, truth, x, exact) <= bound, (scheme, outlier, precision)


_FORKED = """
import os, sys
import numpy as np, quantcore as qc
rng = np.random.default_rng(0)
qw = qc.quantize(rng.standard_normal((1024, 1024)).astype(np.float32))
xs = [rng.standard_normal((m, 1024)).astype(np.float32) for m in (1, 4, 64)]
wanted = [qc.dot(x, qw) for x in xs]
pid = os.fork()
if pid == 0:
    os.environ["QUANTCORE_NUM_THREADS"] = "16"
    for _ in range(40):
        for x, right in zip(xs, wanted):
            assert np.array_equal(qc.dot(x, qw), right)
    from quantcore_backends.cpu_kernels.threads import native_pool
    os._exit(native_pool().threads)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_keeps_within_the_memory_planned_for_its_parents_threads() -> None:
    environment = {**os.environ, "QUANTCORE_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "2\n", done.stderr[-2000:]


_WARM = """
import numpy as np, quantcore as qc
qw = qc.quantize(np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32))
for rows in (1, 6):
    for precision in ("highest", "default"):
        qc.dot(np.ones((rows, 256), np.float32), qw, precision=precision)
"""


def test_a_second_process_compiles_nothing(tmp_path: Any) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _WARM], env=environment, check=True, capture_output=True)
        kept.append({path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")})
    assert kept[0]
    assert kept[0] == kept[1]
