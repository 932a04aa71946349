"""The compiled XLA targets: memory, the interface's check, the fallback, threads, processes, the disk cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantcore as qc
from quantcore_backends.jax_backend import tiles
from quantcore_backends.jax_backend.door import layer_dot
from quantcore_backends.jax_backend.ffi import abi, targets

HEADER = Path(abi.header(jax.ffi.include_dir()))


def temporary(function: Any, *args: Any) -> int:
    """Bytes that the compiled function needs beyond its operands and its result."""
    return int(jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes)


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- memory ---------------------------------------------------------------------------------------------------


def test_no_weight_is_copied_inside_jit(case: Any) -> None:
    it = case(shape=(1024, 1024), rows=1)
    assert temporary(qc.dot, it.x, it.qw) < 1 << 16
    assert temporary(jax.grad(lambda x, w: qc.dot(x, w).sum()), it.x, it.qw) < 1 << 16


def test_a_layer_of_a_stack_is_not_sliced_out(case: Any) -> None:
    it = case(shape=(8, 512, 512), rows=1)
    layer_bytes = it.qw.nbytes // 8

    def by_number(x: Any, stack: Any) -> Any:
        return lax.scan(lambda h, i: (layer_dot(h, stack, i), None), x, jnp.arange(8))[0]

    def by_slice(x: Any, stack: Any) -> Any:
        return lax.scan(lambda h, w: (qc.dot(h, w), None), x, stack)[0]

    assert temporary(by_number, it.x, it.qw) < layer_bytes // 8
    assert temporary(by_slice, it.x, it.qw) > layer_bytes // 2


@pytest.mark.parametrize("along_rows", [False, True])
def test_the_weight_is_dense_in_tiles_only(along_rows: bool) -> None:
    """Of what runs on GPUs, and of many rows of x on the CPU: 64 MiB of weight, and far less memory."""
    rows, columns = 4096, 4096
    scheme = qc.Scheme(bits=4, group_size=64)
    leaves = (
        jax.ShapeDtypeStruct((1, rows, columns // 8), np.uint32),
        jax.ShapeDtypeStruct((1, rows, columns // 64), np.float32),
        jax.ShapeDtypeStruct((1, rows, columns // 64), np.float32),
    )
    x = jax.ShapeDtypeStruct((1, 16, rows if along_rows else columns), np.float32)

    def product(x: Any, leaves: Any) -> Any:
        which = jnp.zeros(1, jnp.int32)
        return tiles.product(x, leaves, which, scheme, columns, along_rows=along_rows, precision="default")

    dense = rows * columns * 4
    assert temporary(product, x, leaves) < dense / 3
    qw = qc.QuantizedTensor(*(jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in leaves), scheme, columns)
    qw = qw.mT if along_rows else qw
    assert temporary(qc.dot, jax.ShapeDtypeStruct(x.shape[1:], x.dtype), qw) < dense / 3


# --- the check of the interface, and what is done without it ----------------------------------------------------


def test_the_header_of_this_jaxlib_is_the_known_one() -> None:
    assert abi.mismatch(jax.ffi.include_dir()) == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#define XLA_FFI_API_MINOR 3", "#define XLA_FFI_API_MINOR 99", r"version 0\.99"),
        ("  void* data;\n  int64_t rank;", "  int64_t rank;\n  void* data;", "Buffer.data"),
        ("XLA_FFI_DataType_U32 = 8", "XLA_FFI_DataType_U32 = 80", "DataType_U32"),
        ("#define XLA_FFI_API_MAJOR 0", "", "can't be read"),
    ],
    ids=["version", "layout", "constant", "unreadable"],
)
def test_another_header_is_noticed(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = HEADER.read_text()
    if old not in text:
        pytest.skip(f"this jaxlib's header has no {old!r}")
    target = Path(abi.header(str(tmp_path)))
    target.parent.mkdir(parents=True)
    target.write_text(text.replace(old, new, 1))
    assert re.search(message, abi.mismatch(str(tmp_path)))


def test_version_0_4_has_another_name_for_the_same(tmp_path: Path) -> None:
    text = HEADER.read_text().replace("XLA_FFI_Extension_Base", "XLA_FFI_InternalExtension")
    target = Path(abi.header(str(tmp_path)))
    target.parent.mkdir(parents=True)
    target.write_text(re.sub(r"(#define XLA_FFI_API_MINOR) \d+", r"\1 4", text))
    assert abi.mismatch(str(tmp_path)) == ""


def test_no_header_is_noticed(tmp_path: Path) -> None:
    assert "can't be read" in abi.mismatch(str(tmp_path))


_PRODUCTS = """
    import warnings
    import numpy as np, jax, jax.numpy as jnp, quantcore as qc
    from quantcore.testing import oracle
    w = np.random.default_rng(0).standard_normal((70, 320)).astype(np.float32)
    worst = 0.0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for scheme in ("affine-int4-g64", "affine-int5-g16", "affine-int8-row"):
            local = qc.quantize(w, scheme)
            qw = local.to("jax")
            exact = oracle.exact_weight(*local.flatten()[0], local.scheme, 320)
            for rows in (1, 5, 40):
                x = np.random.default_rng(1).standard_normal((rows, 320)).astype(np.float32)
                for a, tensor, right in ((x, qw, exact.T), (x[:, :70], qw.mT, exact)):
                    y = np.asarray(jax.jit(qc.dot, static_argnames="precision")(a, tensor, precision="highest"))
                    true = a.astype(float) @ right
                    worst = max(worst, ((y - true) ** 2).sum() / (true ** 2).sum())
    slower = [str(w.message) for w in seen if issubclass(w.category, qc.PerformanceWarning)]
    print(worst < 1e-12, len(slower), *slower)
"""


def test_without_numba_the_products_are_right_and_one_warning_says_so() -> None:
    right, count, *text = run(_PRODUCTS, QUANTCORE_COMPILED="0").split()
    assert (right, count) == ("True", "1")
    assert "QUANTCORE_COMPILED" in " ".join(text)


def test_with_it_there_is_no_warning() -> None:
    assert run(_PRODUCTS).split() == ["True", "0"]


def test_a_module_that_does_not_fit_gives_an_error_of_xlas(case: Any) -> None:
    """The handler checks what XLA hands it, whoever wrote the module."""
    qw = case().qw
    leaves = tuple(leaf[None] for leaf in qw.flatten()[0])
    which = jnp.zeros(1, jnp.int32)
    good = targets._spec("one_row", qw.scheme, 128, "float32")

    def call(x: Any, *leaves: Any, spec: Any = good, shape: Any = (1, 24, 1)) -> Any:
        out = jax.ShapeDtypeStruct(shape, np.float32)
        return jax.block_until_ready(jax.ffi.ffi_call("quantcore_product", out)(x, *leaves, which, spec=spec))

    x = jnp.ones((1, 1, 128))
    assert call(x, *leaves).shape == (1, 24, 1)
    for wrong in (
        lambda: call(x[..., :64], *leaves),
        lambda: call(x, leaves[0][:, :, :8], *leaves[1:]),
        lambda: call(x, leaves[0], leaves[1][:, :12], leaves[2]),
        lambda: call(x, *leaves, shape=(1, 25, 1)),
        lambda: call(x, *leaves, spec=good[:-1]),
        lambda: call(x.astype(jnp.float16), *leaves),
    ):
        with pytest.raises(Exception, match="quantcore: "):
            wrong()


# --- threads and processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 40])
def test_calls_from_several_threads(case: Any, close: Any, rows: int) -> None:
    it = case(shape=(512, 512), rows=rows)
    compiled = jax.jit(qc.dot)
    outputs: list[Any] = []

    def work(factor: int) -> None:
        for _ in range(20):
            outputs.append((factor, np.asarray(compiled(it.x * factor, it.qw))))

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(outputs) == 80
    for factor, out in outputs:
        close(out, factor * it.xs @ it.exact.T)


_FORK = """
    import os, signal, warnings
    warnings.simplefilter("ignore")
    import numpy as np, jax, jax.numpy as jnp, quantcore as qc
    w = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 1024)), jnp.float32)
    qw, x = qc.quantize(w), w[:ROWS]
    compiled = jax.jit(qc.dot)
    before = np.asarray(compiled(x, qw))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = np.array_equal(np.asarray(qc.dot(x, qw)), np.asarray(qc.dot(x, qw)))
        close = np.allclose(np.asarray(CALL(x, qw)), before, rtol=1e-4, atol=1e-4)
        os._exit(0 if same and close else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("call", "rows"), [("qc.dot", 1), ("qc.dot", 300), ("compiled", 1), ("compiled", 16)])
def test_after_a_fork(call: str, rows: int) -> None:
    """Concrete arrays, and what was compiled before the fork."""
    assert run(_FORK.replace("CALL", call).replace("ROWS", str(rows))).strip() == "0"


@pytest.mark.parametrize("threads", [1, 3, 70])
def test_any_number_of_threads(threads: int) -> None:
    """Each has its own scratch memory; of chosen weights of a stack there are several products in one go."""
    code = """
        import numpy as np, jax, jax.numpy as jnp, quantcore as qc
        from quantcore.testing import oracle
        w = np.random.default_rng(0).standard_normal((3, 520, 512)).astype(np.float32)
        local = qc.quantize(w, "affine-int3-g64")
        stack, exact = local.to("jax"), oracle.exact_weight(*local.flatten()[0], local.scheme, 512)
        dot = jax.jit(qc.gather_dot, static_argnames="precision")
        chosen = jnp.arange(7) % 3
        for rows in (1, 3, 9, 100):
            x = np.random.default_rng(1).standard_normal((7, rows, 512)).astype(np.float32)
            for precision, bound in (("default", 1e-8), ("fast", 1e-4), ("highest", 1e-12)):
                made = np.asarray(dot(jnp.asarray(x), stack, jnp.arange(7), chosen, precision=precision), np.float64)
                true = x.astype(float) @ exact[np.arange(7) % 3].swapaxes(1, 2)
                print(((made - true) ** 2).sum() / (true ** 2).sum() <= bound)
    """
    assert run(code, QUANTCORE_NUM_THREADS=str(threads)).split() == ["True"] * 12


def test_only_the_kernels_that_a_product_needs_are_loaded() -> None:
    code = """
        import jax, jax.numpy as jnp, quantcore as qc
        from quantcore_backends.cpu_kernels import integer
        from quantcore_backends.jax_backend.ffi import frame
        qw = qc.quantize(jnp.ones((40, 128)), "affine-int4-g64")
        before = 0
        cases = [(1, "default"), (3, "default"), (2, "default"), (4, "default"), (1, "fast"), (5, "default")]
        for rows, precision in (*cases, (32, "highest")):
            jax.jit(qc.dot, static_argnames="precision").lower(jnp.ones((rows, 128)), qw, precision=precision)
            loaded = sum(address != 0 for address in frame.TABLE[frame.FIRST_ROUNDED :: 3])
            print(loaded - before)
            before = loaded
        print(int(integer.has_byte_dot(qw.scheme)), int(integer.has_wide(qw.scheme)))
    """
    *loaded, fast, wide = run(code).split()
    assert loaded == ["1", "0", "1", "0", fast, "1", wide]


def test_the_disk_cache_serves_the_next_process(tmp_path: Path) -> None:
    """The second process compiles nothing anew, and gets the same."""
    code = """
        import numba, numpy as np, jax, jax.numpy as jnp, quantcore as qc
        from numba.core import event
        w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)
        with event.install_recorder("numba:compile") as seen:
            y = jax.jit(qc.dot)(w[:1], qc.quantize(w, "affine-int4-g64"))
            y.block_until_ready()
        print(len(seen.buffer), np.asarray(y, np.float64).sum())
    """
    cold = run(code, NUMBA_CACHE_DIR=str(tmp_path)).split()
    warm = run(code, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert int(cold[0]) > 0
    assert int(warm[0]) == 0
    assert cold[1] == warm[1]


def test_an_exported_module_runs_in_another_process(case: Any, close: Any, tmp_path: Path) -> None:
    """It finds its kernels once they are loaded there, and gives an error of XLA's before that."""
    it = case()
    checks = [jax.export.DisabledSafetyCheck.custom_call("quantcore_product")]
    leaves, rebuild = it.qw.flatten()
    made = jax.export.export(jax.jit(lambda x, *leaves: qc.dot(x, rebuild(leaves))), disabled_checks=checks)
    (tmp_path / "module").write_bytes(bytes(made(it.x, *leaves).serialize()))
    np.savez(tmp_path / "operands.npz", it.x, *leaves)
    code = f"""
        import numpy as np, jax.export, quantcore.jax
        module = jax.export.deserialize(bytearray(open({str(tmp_path / "module")!r}, "rb").read()))
        operands = list(np.load({str(tmp_path / "operands.npz")!r}).values())
        quantcore.jax.load("affine-int8-g64")
        try:
            print(module.call(*operands))
        except Exception as error:
            print("quantcore.jax.load" in str(error))
        quantcore.jax.load("affine-int4-g64")
        np.save({str(tmp_path / "result.npy")!r}, module.call(*operands))
    """
    assert run(code).strip() == "True"
    close(np.load(tmp_path / "result.npy"), it.xs @ it.exact.T)


def test_libraries_of_one_process_do_not_disturb_one_another() -> None:
    """JAX inside jit, NumPy and MLX, in threads of their own at the same time."""
    code = """
        import threading, numpy as np, jax, quantcore as qc
        w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
        x = np.random.default_rng(1).standard_normal((1, 512)).astype(np.float32)
        local = qc.quantize(w)
        true = x.astype(float) @ local.dequantize().astype(float).T
        wrong, done = [], []
        def work(library, dot):
            qw = local.to(library)
            for _ in range(50):
                y = np.asarray(qc.to_library(dot(qc.to_library(x, library), qw), "numpy"))
                if ((y - true) ** 2).sum() / (true ** 2).sum() > 1e-8:
                    wrong.append(library)
            done.append(library)
        jobs = [("numpy", qc.dot), ("jax", jax.jit(qc.dot)), ("mlx", qc.dot), ("jax", qc.dot)] * 2
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        [t.start() for t in threads]
        [t.join(100) for t in threads]
        print(len(done), wrong)
    """
    assert run(code).strip() == "8 []"


def test_importing_quantcore_imports_no_jax() -> None:
    code = """
        import sys, numpy as np, quantcore as qc, quantcore.jax
        qw = qc.quantize(np.ones((4, 64), np.float32))
        qc.dot(np.ones((1, 64), np.float32), qw)
        print("jax" in sys.modules)
    """
    assert run(code).strip() == "False"


@pytest.mark.parametrize(
    "made",
    [
        "qc.quantized_tensor(*leaves, (24, 128), 'affine-int4-g64')",
        "qc.QuantizedTensor(*leaves, qc.Scheme(bits=4, group_size=64), 128)",
        "local.to('jax')",
        "pickle.loads(pickled)",
    ],
)
def test_every_way_of_making_a_tensor_makes_it_a_pytree(made: str) -> None:
    """With nothing imported but quantcore and jax, and no operation called before."""
    code = f"""
        import pickle, numpy as np, jax, jax.numpy as jnp, quantcore as qc
        local = qc.quantize(np.random.default_rng(0).standard_normal((24, 128)).astype(np.float32))
        leaves = [jnp.asarray(leaf) for leaf in local.flatten()[0]]
        if "pickled" in {made!r}:
            import subprocess, sys
            pickled = subprocess.run([sys.executable, "-c", "import pickle, sys, numpy as np, quantcore as qc;"
                "qw = qc.quantize(np.random.default_rng(0).standard_normal((24, 128)).astype(np.float32)).to('jax');"
                "sys.stdout.buffer.write(pickle.dumps(qw))"], capture_output=True, check=True).stdout
        qw = {made}
        print(jax.jit(lambda x, w: x @ w.mT)(jnp.ones((2, 128)), qw).shape)
    """
    assert run(code).strip() == "(2, 24)"


@pytest.mark.parametrize("scheme", ["affine-int4-g64", "mxfp4"])
@pytest.mark.parametrize("made", ["qc.QuantizedTensor(*leaves, None, scheme, 128)", "jax.eval_shape(qc.quantize, w)"])
def test_a_weight_of_structs_is_lowered_for_in_a_fresh_process(scheme: str, made: str) -> None:
    """Ahead of time: nothing of JAX's backend was used before, and no array is made."""
    code = f"""
        import numpy as np, jax, quantcore as qc
        scheme, struct = qc.Scheme.parse({scheme!r}), jax.ShapeDtypeStruct
        kind = np.float32 if scheme.has_biases else np.uint8
        scales = struct(scheme.scales_shape((24, 128)), kind)
        leaves = (struct(scheme.packed_shape((24, 128)), np.uint32), scales)
        w, x = struct((24, 128), np.float32), struct((2, 128), np.float32)
        qw = {made}
        lowered, traced = jax.jit(qc.dot).lower(x, qw), jax.eval_shape(qc.dot, x, qw)
        print(lowered.out_info.shape, traced.shape, len(jax.tree.leaves(qw)))
    """
    if scheme == "affine-int4-g64":
        code = code.replace("*leaves, None", "*leaves, scales")
    code = code.replace("jax.eval_shape(qc.quantize, w)", "jax.eval_shape(lambda w: qc.quantize(w, scheme), w)")
    leaves = 2 if scheme == "mxfp4" else 3
    assert run(code).strip() == f"(2, 24) (2, 24) {leaves}"


def test_a_weight_of_structs_has_no_values(case: Any) -> None:
    it = case(shape=(2, 24, 128))
    structs = jax.eval_shape(lambda qw: qw, it.qw)
    calls = {
        "dequantize": lambda: qc.dequantize(structs),
        "dot": lambda: qc.dot(it.x, structs),
        "take": lambda: qc.take(structs, jnp.arange(2)),
        "gather_dot": lambda: qc.gather_dot(jnp.ones((1, 3, 128)), structs, 0, 1),
    }
    for op, call in calls.items():
        with pytest.raises(
            TypeError, match=rf"{op}: the weight .*ShapeDtypeStruct, which ha.*no values.*jax\.eval_shape"
        ):
            call()
