"""What this machine can do at most: reads from cache and memory, and multiplications of several kinds.

Measured with the kernels' own vectors and threads, the best of many repeats. No product can take less time than to
read its weight, or than its multiplications take at their peak: the *roofline* of Williams, Waterman & Patterson
(2009).
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from cpu_candidates import BFLOAT16, BYTE_DOT, FMA, SHORT_DOT
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from quantcore_backends.cpu_kernels import amx, pool, simd_amx, simd_int
from quantcore_backends.cpu_kernels.disk_cache import COMPILED
from quantcore_backends.cpu_kernels.job import KERNEL, addresses_at, floats_at
from quantcore_backends.cpu_kernels.simd import fma, load, splat, total, zero
from quantcore_backends.cpu_kernels.threads import native_pool
from quantcore_backends.cpu_kernels.vectors import (
    BYTE,
    BYTES,
    DWORDS,
    FLOATS,
    LANES,
    QWORD,
    SHORTS,
    called,
    fused,
    offset,
    pointer_to,
    read,
    write,
)

MIB = 1 << 20
VECTOR = 4 * LANES
LINE = 64
BITS = 4
"""Bits of the codes in the dots of bytes: how many pairs can be summed in 16 bits depends on them."""
CHUNK = 8 * VECTOR
"""Bytes of one turn of the reading loop."""
STRIDE = 1 << 18
"""Bytes to which sizes of arrays are rounded up."""
OPERANDS = 1 << 15
"""Bytes of operands for multiplications, which stay in the nearest cache."""
STEPS, TURNS = 1 << 13, 2
"""Turns of the multiplying loop, and of its body."""

PER_LANE = {FMA: 1, SHORT_DOT: 2, BYTE_DOT: 4}
"""Multiplications in a 32-bit lane of one operation."""


def last_level_cache() -> int:
    """Bytes of the largest cache that the system reports; 0 where it reports none."""
    if platform.system() == "Darwin":
        names = ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")
        found = [subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False) for name in names]
        return max((int(one.stdout) for one in found if one.stdout.strip().isdigit()), default=0)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": MIB}.get(text[-1], 1 << 30))
    return max(sizes, default=0)


@cfunc(KERNEL, **COMPILED)
def _read(address: Any, thread: Any, first: Any, last: Any) -> None:
    """Parts from `first` to `last` of the array, added up; past the last part comes the first again."""
    job = addresses_at(address, 4)
    chunks, parts = job[2], job[3]
    one = splat(np.float32(1))
    a0, a1, a2, a3, a4, a5, a6, a7 = zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()
    for index in range(first, last):
        part = index % parts
        for at in range(job[0] + chunks * part // parts * CHUNK, job[0] + chunks * (part + 1) // parts * CHUNK, CHUNK):
            a0, a1 = fma(load(at), one, a0), fma(load(at + VECTOR), one, a1)
            a2, a3 = fma(load(at + 2 * VECTOR), one, a2), fma(load(at + 3 * VECTOR), one, a3)
            a4, a5 = fma(load(at + 4 * VECTOR), one, a4), fma(load(at + 5 * VECTOR), one, a5)
            a6, a7 = fma(load(at + 6 * VECTOR), one, a6), fma(load(at + 7 * VECTOR), one, a7)
    out = floats_at(job[1] + thread * LINE, 1)
    out[0] += total(a0) + total(a1) + total(a2) + total(a3) + total(a4) + total(a5) + total(a6) + total(a7)


def _block(kind: str, dot: str | None) -> tuple[int, int, int]:
    """Left and right operands of a block of sums, and products that are added to a sum together.

    As many sums as hide an operation's latency, and no more than there are registers for.
    """
    if LANES == 16:
        return 4, 4, 1
    if kind == SHORT_DOT:
        return 1, 8, 1
    return (1, 8, 8) if kind == BYTE_DOT and dot == "maddubs" else (3, 4, 1)


def _multiplications(kind: str, dot: str | None) -> tuple[Any, int]:
    """Kernel that does `STEPS` steps of operations, and how many multiplications are in a step."""
    rows, columns, depth = _block(kind, dot)
    left_type, right_type = {FMA: (FLOATS, FLOATS), SHORT_DOT: (SHORTS, SHORTS), BYTE_DOT: (BYTES, BYTES)}[kind]
    sum_type = FLOATS if kind == FMA else DWORDS

    def added(builder: Any, so_far: Any, pairs: list[tuple[Any, Any]]) -> Any:
        if kind != FMA:
            return simd_int.add_products(builder, so_far, pairs, BITS)
        for left, right in pairs:
            so_far = fused(builder, left, right, so_far)
        return so_far

    @intrinsic
    def multiply(typing: Any, operands: Any, out: Any) -> Any:
        """Sums of products of a block's operands, which a step finds elsewhere than the last, so none is hoisted."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums = [cgutils.alloca_once(builder, sum_type) for _ in range(rows * columns)]
            for place in sums:
                builder.store(ir.Constant(sum_type, [0] * LANES), place)
            with cgutils.for_range(builder, ir.Constant(QWORD, STEPS)) as loop:
                apart = builder.and_(loop.index, ir.Constant(QWORD, 3))
                here = builder.add(args[0], builder.mul(apart, ir.Constant(QWORD, OPERANDS // 4)))
                for turn in range(TURNS):
                    at = offset(builder, here, turn * (rows + columns * depth) * VECTOR)
                    left = [read(builder, offset(builder, at, i * VECTOR), left_type) for i in range(rows)]
                    for column in range(columns):
                        first = (rows + column * depth) * VECTOR
                        right = [
                            read(builder, offset(builder, at, first + i * VECTOR), right_type) for i in range(depth)
                        ]
                        for row in range(rows):
                            place = sums[row * columns + column]
                            pairs = [(left[row], value) for value in right]
                            builder.store(added(builder, builder.load(place), pairs), place)
            for place in sums:
                whole = builder.bitcast(builder.load(place), DWORDS)
                write(builder, args[1], builder.xor(read(builder, args[1], DWORDS), whole))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    @cfunc(KERNEL, **COMPILED)
    def kernel(address: Any, thread: Any, first: Any, last: Any) -> None:
        job = addresses_at(address, 2)
        for _ in range(first, last):
            multiply(job[0], job[1] + thread * LINE)

    return kernel, TURNS * rows * columns * depth * LANES * PER_LANE[kind]


def _matrix_multiplications() -> tuple[Any, int]:
    """As :func:`_multiplications`, of bytes in matrix units: two tiles of x by one of codes, all loaded each time."""
    nothing, line = ir.VoidType(), ir.Constant(QWORD, LINE)

    def number(tile: int) -> Any:
        return ir.Constant(BYTE, tile)

    @intrinsic
    def multiply(typing: Any, operands: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with cgutils.for_range(builder, ir.Constant(QWORD, STEPS)) as loop:
                apart = builder.and_(loop.index, ir.Constant(QWORD, 3))
                here = builder.add(args[0], builder.mul(apart, ir.Constant(QWORD, OPERANDS // 4)))
                for tile in (2, 3, 4):
                    at = pointer_to(builder, offset(builder, here, tile * 16 * LINE), BYTE)
                    called(builder, "llvm.x86.tileloadd64", nothing, [number(tile), at, line])
                for total in (0, 1):
                    operands = [number(total), number(3 + total), number(2)]
                    called(builder, "llvm.x86.tdpbsud", nothing, operands)
            return context.get_dummy_value()

        return types.void(types.intp), generate

    @cfunc(KERNEL, **COMPILED)
    def kernel(address: Any, thread: Any, first: Any, last: Any) -> None:
        job = addresses_at(address, 2)
        simd_amx.configure(job[1] + thread * LINE, 16, 64)
        for _ in range(first, last):
            multiply(job[0])
        simd_amx.release()

    return kernel, 2 * 16 * 16 * 64


class Limits:
    """Peaks of the threads that quantcore's kernels use.

    Attributes
    ----------
    cache : int
        Bytes of the last-level cache as reported; 0 if unknown.
    peaks : dict of str to float
        Multiplications per second of vectors, by kind of arithmetic; without the 8-bit dot where the target has none.
    matrix_peak : float
        Those of bytes in matrix units, which no roofline looks at; 0 where quantcore uses none.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self._pool, self._seconds = native_pool(), seconds
        self.threads, self.cache = self._pool.threads, last_level_cache()
        self._sink = np.zeros(self.threads * LINE + LINE, np.uint8)
        self._memory = np.ones(max(512 * MIB, 4 * self.cache) // 4, np.float32)
        self._read: dict[int, float] = {}
        self.dot = simd_int.byte_dot(BITS)
        kinds = [kind for kind in PER_LANE if kind != BYTE_DOT or self.dot]
        self._kernels = {kind: _multiplications(kind, self.dot) for kind in kinds}
        self.peaks = dict.fromkeys(kinds, 0.0)
        units = simd_amx.on_target() and amx.permitted()
        self.matrix_peak = self._peak(*_matrix_multiplications()) if units else 0.0
        self.measure_peaks()

    def measure_peaks(self) -> None:
        """Measure peaks again, of which the highest counts: one moment of a shared machine may be a slow one."""
        for kind, kernel in self._kernels.items():
            self.peaks[kind] = max(self.peaks[kind], self._peak(*kernel))

    def _parallel(self, kernel: Any, data: int, count: int, *more: int) -> Callable[[], None]:
        job = np.array([data, self._sink.ctypes.data + -self._sink.ctypes.data % LINE, *more], np.int64)
        return lambda: pool.parallel(self._pool.address, kernel.address, job.ctypes.data, count, 1)

    def _best(self, call: Callable[[], None], least: int = 5) -> float:
        call()
        best, repeats, end = np.inf, 0, time.perf_counter() + self._seconds
        while repeats < least or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best, repeats = min(best, time.perf_counter() - start), repeats + 1
        return float(best)

    def _peak(self, kernel: Any, per_step: int) -> float:
        operands = np.random.default_rng(0).uniform(0.5, 1, OPERANDS // 4 + LINE // 4).astype(np.float32)
        start = operands.ctypes.data + -operands.ctypes.data % LINE
        parts = 16 * self.threads
        return per_step * STEPS * parts / self._best(self._parallel(kernel, start, parts))

    def bandwidth(self, size: int) -> float:
        """Bytes per second at which an array of `size` bytes is read again and again, wherever it then lies.

        Sizes beyond 4 × the last-level cache are all alike: they come from DRAM.
        """
        size = min(-(-size // STRIDE) * STRIDE, self._memory.nbytes)
        if size not in self._read:
            chunks, parts = size // CHUNK, 8 * self.threads
            turns = max(1, 4 * MIB // size)  # enough that starting the threads doesn't count
            call = self._parallel(_read, self._memory.ctypes.data, parts * turns, chunks, parts)
            self._read[size] = size * turns / self._best(call)
        return self._read[size]

    def roofline(self, weight_bytes: int, multiplications: int, arithmetic: str) -> tuple[float, str] | None:
        """Least seconds of a product, and what limits it: "reads" or "arithmetic"; None where its peak is unknown."""
        if arithmetic == BFLOAT16:
            features = llvm.get_host_cpu_features()
            if any(features.get(name) for name in ("avx512bf16", "amx-bf16", "bf16")):
                return None  # multiplied by units that nothing here measures
            arithmetic = FMA
        peaks = dict(self.peaks)
        in_layers = peaks.get(BYTE_DOT, 0) / 2  # 16-bit activations as two layers of bytes
        peaks[SHORT_DOT] = max(peaks[SHORT_DOT], in_layers)
        peak = peaks.get(arithmetic, peaks[SHORT_DOT])
        reading, computing = weight_bytes / self.bandwidth(weight_bytes), multiplications / peak
        return max((reading, "reads"), (computing, "arithmetic"))

    def facts(self) -> dict[str, Any]:
        """All that was measured, for a results file."""
        from quantcore_backends.cpu_kernels.compiled import available

        features = llvm.get_host_cpu_features()
        return {
            "threads": self.threads,
            "last_level_cache_mib": round(self.cache / MIB, 2),
            "vector_bits": 32 * LANES,
            "byte_dot": self.dot,
            "llvm_cpu": os.environ.get("NUMBA_CPU_NAME", llvm.get_host_cpu_name()),
            "features": sorted(name for name in features if features[name]),
            "compiled_kernels": available(),
            "dram_gb_per_s": round(self.bandwidth(self._memory.nbytes) / 1e9, 2),
            "cache_gb_per_s": round(self.bandwidth(min(8 * MIB, self.cache // 2 or 8 * MIB)) / 1e9, 2),
            "read_gb_per_s_by_mib": {size / MIB: round(rate / 1e9, 2) for size, rate in sorted(self._read.items())},
            "giga_multiplications_per_s": {kind: round(peak / 1e9, 1) for kind, peak in self.peaks.items()},
            "giga_multiplications_per_s_in_matrix_units": round(self.matrix_peak / 1e9, 1),
        }


def main() -> None:
    for name, value in Limits().facts().items():
        print(f"{name}: {' '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
