"""A third party's distribution, installed beside the project: its backend passes the kit, its broken ones harm nobody.

Install it with ``pip install ./tests/third_party_backend``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

DISTRIBUTION = "quantcore-thirdparty-example"
BROKEN = {
    "thirdparty_raises_on_import": "RuntimeError: this plugin is broken on purpose",
    "thirdparty_wrong_signature": "hook dot of quantcore_thirdparty_example.wrong_signature.WrongSignature has the",
}


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        missing = f"{DISTRIBUTION} isn't installed: pip install ./tests/third_party_backend"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where this project's configuration isn't."""
    environ = {**os.environ, "COLUMNS": "200"}
    environ.pop("QUANTCORE_DISABLE", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=500)


def test_the_working_backend_passes_the_kit(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    kit = ["-p", "quantcore.testing.plugin", "--pyargs", "quantcore.testing.conformance"]
    done = python(
        tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kit, "--quantcore-backend", "thirdparty_example"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend thirdparty_example on quantcore_thirdparty_example arrays" in done.stdout
    ran = dict(re.findall(r"^  (\w+) +(\d+) +\d+$", done.stdout, re.MULTILINE))
    assert {op for op, count in ran.items() if int(count) > 100} == {
        "dequantize",
        "dot",
        "gather_dot",
        "quantize",
        "take",
    }
    assert set(re.findall(r"^  (\w+) refused", done.stdout, re.MULTILINE)) == {"prepack"}


def test_it_computes_in_arrays_of_its_own_without_being_named(tmp_path: Path) -> None:
    program = """
import numpy as np, quantcore as qc
w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
x = np.ones((2, 64), np.float32)
qw = qc.quantize(w, bits=4, group_size=32)
moved, mine = qw.to("quantcore_thirdparty_example"), qc.to_library(x, "quantcore_thirdparty_example")
print(type(mine).__module__, qc.explain("dot", mine, moved).backend, qc.explain("dot", x, qw).backend)
y = qc.dot(mine, moved)
assert type(y) is type(mine)
exact = x @ qw.dequantize().T
assert ((qc.to_library(y, "numpy") - exact) ** 2).sum() <= 1e-8 * (exact**2).sum()
xp = qc.array_namespace(mine)
np.testing.assert_array_equal(qc.to_library(xp.matmul(mine, moved.mT), "numpy"), qc.to_library(y, "numpy"))
clipped = qc.quantize(qc.to_library(np.full((2, 32), np.nan), "quantcore_thirdparty_example"), group_size=32,
                      nonfinite="clip")
assert not qc.to_library(clipped.dequantize(), "numpy").any()
try:
    qc.dot(x, moved)
except TypeError as error:
    print(error)
"""
    done = python(tmp_path, "-W", "ignore", "-c", program)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "quantcore_thirdparty_example.arrays thirdparty_example numpy"
    assert "qw.to('numpy')" in second


def test_the_broken_ones_are_reported_and_disturb_nobody(tmp_path: Path) -> None:
    program = """
import sys, warnings
import numpy as np
import quantcore as qc
assert not any("thirdparty" in name for name in sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    records = {record.name: record for record in qc.backends()}
    x = np.ones((2, 64), np.float32)
    qw = qc.quantize(np.ones((4, 64), np.float32))
    assert qc.explain("dot", x, qw).backend == "numpy"
    np.testing.assert_allclose(qc.dot(x, qw), np.full((2, 4), 64.0), rtol=1e-6)
    qc.backends()
for warning in caught:
    assert warning.category is qc.BackendWarning, warning
    print("warning", warning.message)
for record in records.values():
    print(record.name, record.state, record.reason)
    assert (record.exception is None) == (record.state is not qc.State.BROKEN)
try:
    qc.dot(x, qw, backend="thirdparty_wrong_signature")
except qc.BackendUnavailableError as error:
    print("error", error)
"""
    done = python(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("warning") for line in lines) == len(BROKEN)
    for name, reason in BROKEN.items():
        assert any(line.startswith(f"{name} BROKEN") and reason in line for line in lines), done.stdout
        assert any(line.startswith("warning") and name in line and reason in line for line in lines), done.stdout
    for name in ("array_api", "mlx", "numpy", "thirdparty_example"):
        assert f"{name} READY " in done.stdout
    assert "error" in lines[-1]
    assert "BROKEN" in lines[-1]


def test_the_command_lists_them(tmp_path: Path) -> None:
    done = python(tmp_path, "-W", "ignore", "-m", "quantcore.cli", "backends")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "READY" in rows["thirdparty_example"]
    assert f"{DISTRIBUTION} 0.1.0" in rows["thirdparty_example"]
    for name, reason in BROKEN.items():
        assert "BROKEN" in rows[name]
        assert reason.split()[0] in done.stdout
