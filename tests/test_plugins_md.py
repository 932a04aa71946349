"""plugins.md is true: its example, installed as it stands there, passes the kit; its tables list what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import quantcore as qc
from quantcore import hookspecs

TEXT = (Path(__file__).parent.parent / "plugins.md").read_text()


def files() -> dict[str, str]:
    """The example's files: each fenced block under a heading that is a file name."""
    return dict(re.findall(r"^#### `([^`]+)`\n\n```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def section(title: str) -> str:
    """The text under a second-level heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"plugins.md has no section {title!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    """The code in the first column of the tables in `text`."""
    return re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example in it as an installer leaves it: modules, and entry points in a .dist-info."""
    folder = tmp_path_factory.mktemp("site")
    made = files()
    described = tomllib.loads(made["pyproject.toml"])
    project = described["project"]
    for module in described["tool"]["setuptools"]["py-modules"]:
        (folder / f"{module}.py").write_text(made[f"{module}.py"])
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "test_conformance.py").write_text(made["test_conformance.py"])
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the example installed."""
    environ = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    environ.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=500
    )


def ran(result: subprocess.CompletedProcess[str]) -> int:
    """Tests that passed in a pytest run that succeeded."""
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) passed", result.stdout)
    assert found is not None, result.stdout[-2000:]
    return int(found[1])


def test_example_has_the_three_files() -> None:
    assert list(files()) == ["pyproject.toml", "quantcore_float64.py", "test_conformance.py"]


def test_example_is_found_by_its_entry_point_and_disturbs_nobody(installed: Path) -> None:
    code = """
import numpy as np, quantcore as qc
record = next(r for r in qc.backends() if r.name == "float64")
print(record.state, record.origin)
w = np.linspace(-1, 1, 8 * 256, dtype=np.float32).reshape(8, 256)
x, qw = w[:2], qc.quantize(w)
print(qc.explain("dot", x, qw))
with qc.use_backend("float64"):
    print(qc.explain("dot", x, qw).backend)
print(qc.prepack(qw, backend="float64").layout)
"""
    result = run(installed, "-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    state, *told, named, layout = result.stdout.splitlines()
    assert state == "READY quantcore-float64 0.1.0 (quantcore_float64:backend)"
    assert (named, layout) == ("float64", "float64-bytes")
    shown = re.search(r"((?:^    .*\n)+)", section("How a backend is chosen"), re.MULTILINE)
    assert shown is not None
    ours = [line for line in told if line.lstrip().startswith(("dot", "→ numpy", "float64", "array_api"))]
    assert [line.removeprefix("    ") for line in shown[1].splitlines()] == ours


@pytest.mark.slow  # the whole kit runs on tests/third_party_backend too
def test_example_passes_the_kit(installed: Path) -> None:
    name = tomllib.loads(files()["pyproject.toml"])["project"]["entry-points"]["quantcore.backends"]
    command = "pytest -p quantcore.testing.plugin --pyargs quantcore.testing.conformance --quantcore-backend"
    assert f"    {command} float64\n" in section("Running the kit")
    result = run(installed, "-m", *command.split(), *name, "-p", "no:cacheprovider", "-q")
    assert ran(result) > 500
    assert "failed" not in result.stdout


def test_subclass_of_three_lines_runs_on_the_example(installed: Path) -> None:
    result = run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_conformance.py", "-k", "prepack or take"
    )
    assert ran(result) > 10


def test_every_hook_is_listed_with_its_signature() -> None:
    listed = first_column(section("The contract"))
    signatures = [signature for cell in listed for signature in re.findall(r"`(\w+\(.*?\))`", cell)]
    wanted = []
    for hook in hookspecs.REQUIRED_HOOKS + hookspecs.OPTIONAL_HOOKS:
        code = getattr(hookspecs.Backend, hook).__code__
        wanted.append(f"{hook}({', '.join(code.co_varnames[1 : code.co_argcount])})")
    assert sorted(signatures) == sorted(wanted)


def test_every_field_deviation_state_and_precision_is_listed() -> None:
    listed = first_column(section("BackendInfo"))
    names = [cell.strip("`") for cell in listed]
    assert names == [f.name for f in fields(qc.BackendInfo)] + list(hookspecs.DEVIATIONS)
    for name, meaning in hookspecs.DEVIATIONS.items():
        assert f"| `{name}` | {meaning} |" in section("BackendInfo")
    assert re.findall(r"^\| ([A-Z]+) \|", section("Registration"), re.MULTILINE) == [str(state) for state in qc.State]
    for cell in (["default", "1e-8"], ["highest", "1e-12"], ["fast", "1e-4"]):
        assert f'| `"{cell[0]}"` | {cell[1]} |' in section("The contract")
