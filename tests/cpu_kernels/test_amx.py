"""The kernels for matrix units: their code is that of the units, and all but the units' part is run on any AVX-512."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from quantcore_backends.cpu_kernels import amx
from quantcore_backends.cpu_kernels.vectors import LANES, target_has

FEATURES = (
    "avx,avx2,fma,f16c,bmi,bmi2,popcnt,sse4.2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vbmi,avx512vnni,"
    "amx-tile,amx-int8"
)

_COMPILED = """
from quantcore_backends.cpu_kernels import kernels_amx, simd_amx
assert simd_amx.on_target()
for bits, run, width in ((4, 64, 8), (4, 32, 16), (3, 16, 16), (8, 64, 8)):
    text = kernels_amx.matrix_tiles(bits, run, width)._library.get_asm_str()
    found = {line.split()[0] for line in text.splitlines() if line.startswith("\\t") and not line.startswith("\\t.")}
    print(sorted(found & {"ldtilecfg", "tilerelease", "tileloadd", "tdpbsud", "tilestored", "vcvtdq2ps"}))
"""

# The units' part in Python: what a tile of sums is, and how it is scaled.
_EMULATED = """
import numpy as np
from numba import njit
from quantcore_backends.cpu_kernels import amx, simd_amx
from quantcore_backends.cpu_kernels.disk_cache import COMPILED
from quantcore_backends.cpu_kernels.job import bytes_at, floats_at

@njit(**COMPILED)
def configure(place, height, run):
    bytes_at(place, 64)[0] = height

@njit(**COMPILED)
def release():
    pass

@njit(**COMPILED)
def matrix_product(x, x_scales, codes, scales, out, spill, runs, left, group_runs, height, run, layers):
    group, rows = 0, floats_at(out, height * 16)
    for r in range(runs):
        scale, its_scales = floats_at(scales + group * 128, 32), floats_at(x_scales + r * 8 * height, 2 * height)
        for m in range(height):
            its = bytes_at(x + (r * height + m) * run * layers, run * layers)
            for n in range(16):
                total = 0
                for layer in range(layers):
                    total *= 256
                    for k in range(run):
                        code = bytes_at(codes + r * run * 16 + k // 4 * 64 + n * 4 + k % 4, 1)[0]
                        total += np.int64(np.int8(its[layer * run + k])) * np.int64(code)
                product = np.float32(total) * its_scales[m] * scale[n]
                rows[m * 16 + n] += product + scale[16 + n] * its_scales[height + m]
        left -= 1
        if left == 0:
            left, group = group_runs, group + 1

simd_amx.configure, simd_amx.release, simd_amx.matrix_product = configure, release, matrix_product
simd_amx.on_target = amx.permitted = lambda: True
"""

_PRODUCTS = """
import ml_dtypes
import quantcore as qc
from quantcore.testing import oracle
from quantcore_backends.cpu_kernels import integer

def check(rows, columns, scheme, counts, dtype=np.float32):
    rng = np.random.default_rng(columns)
    qw = qc.quantize(rng.standard_normal((rows, columns)).astype(dtype), scheme, pad=True)
    exact = oracle.exact_weight(qw.packed, qw.scales, qw.biases, qw.scheme, columns)
    for count in counts:
        x = rng.standard_normal((count, columns)).astype(np.float32)
        truth = oracle.product(x, exact)
        for precision in ("default", "fast"):
            result = qc.dot(x, qw, precision=precision)
            error = oracle.nmse(result - truth, truth, x, exact)
            assert error <= oracle.BOUNDS[precision], (scheme, rows, columns, count, precision, error)

integer.IN_UNITS[8] = 0
assert integer.tile_kernels(qc.Scheme("affine", 4, 64), 8).height == 16
for bits, group in schemes:
    check(21, 1100, qc.Scheme("affine", bits, group), (5, 19))
scheme = qc.Scheme("affine", 4, 64)
check(300, 2200, scheme, (8, 9, 16, 17, 24, 25, 70, 150))
check(16, 72, qc.Scheme("affine", 4, 32), (33, 530))
check(50, 1100, qc.Scheme("affine", 4, 32), (7, 40), np.float16)
check(50, 1100, qc.Scheme("affine", 6, 128), (7, 40), ml_dtypes.bfloat16)

qw = qc.quantize(np.ones((40, 1100), np.float32), scheme, pad=True)
scales = qw.scales.copy()
scales[33, 17] = np.inf
changed = qc.quantized_tensor(qw.packed, scales, qw.biases, qw.shape, qw.scheme)
for weight, x in ((changed, np.ones((20, 1100), np.float32)), (qw, np.full((20, 1100), np.nan, np.float32))):
    of = integer.Weight.of(weight.packed, weight.scales, weight.biases, weight.scheme, 1100)
    assert not integer.multiply(x, 20, of, np.empty((20, 40), np.float32), 16)
print("right")
"""

_FEW_AND_WITHOUT_LEAVE = """
integer.IN_UNITS[8] = 16
assert [integer.tile_kernels(scheme, 8, rows).height for rows in (15, 16)] == [8, 16]
assert integer.tile_kernels(scheme, 16, 5).height == 16
integer._compiled().matrix_units = False
assert integer.tile_kernels(scheme, 16).height == 8
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86's features")
def test_kernels_are_compiled_to_the_units_instructions(tmp_path: Any) -> None:
    features = ",".join(f"+{name}" for name in FEATURES.split(","))
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    all_of_them = ["ldtilecfg", "tdpbsud", "tileloadd", "tilerelease", "tilestored", "vcvtdq2ps"]
    assert done.stdout.splitlines() == [str(all_of_them)] * 4


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86's features")
def test_products_are_right_with_the_units_emulated(split: Callable[..., str], tmp_path: Any) -> None:
    native = LANES == 16 and target_has("avx512vnni")
    schemes = [(3, 64), (4, None), (8, 64)]
    if native:
        schemes += [(1, 32), (2, 16), (4, 16), (4, 128), (5, 32), (6, 128)]
    products = f"schemes = {schemes}\n{_PRODUCTS}"
    code = _EMULATED + products + _FEW_AND_WITHOUT_LEAVE if native else split("avx512vnni") + _EMULATED + products
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="only Linux on x86 is asked")
@pytest.mark.parametrize(("answer", "permitted"), [(0, True), (-1, False)])
def test_leave_is_asked_for_once_and_a_refusal_believed(
    answer: int, permitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class System:
        def syscall(self, *numbers: int) -> int:
            asked.append(numbers)
            return answer

    monkeypatch.setattr(amx.ctypes, "CDLL", lambda name: System())
    monkeypatch.setattr(amx, "permitted", cache(amx.permitted.__wrapped__))
    assert [amx.permitted(), amx.permitted()] == [permitted] * 2
    assert asked == [(158, 0x1023, 18)]
