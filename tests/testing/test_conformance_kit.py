"""The kit catches wrong backends, lets right ones pass, and never passes by running nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent

SUITE = """
import quantcore
from defective import BACKENDS
from quantcore.testing import BackendConformance

for name, backend in BACKENDS.items():
    quantcore.register(backend())
    globals()["Test" + name] = type("Test" + name, (BackendConformance,), {"backend": backend.name})
"""

WRONG = {
    "RoundsTiesAway": ("test_quantize_matches_the_reference", "packed codes of ties groups"),
    "EncodesTwiceTheRange": ("test_quantize_matches_the_reference", "is off by more than a step"),
    "LeavesSpareBitsSet": ("test_quantize_shapes", "packed codes of short last group"),
    "DequantizesWithTwoRoundings": ("test_dequantize_matches_the_rule", "elements differ"),
    "AccumulatesInHalfPrecision": ("test_dot_half_precision", "over the bound 1e-08"),
    "QuantizesActivations": ("test_dot_precision", "over the bound 1e-08"),
    "NarrowsFloat64": ("test_dot_of_float64_is_computed_in_float64", "wasn't computed in float64"),
    "GivesAnotherArrayType": ("test_dot_shapes", "not numpy's own array type"),
    "GivesFloat32": ("test_dot_of_unequal_dtypes", "gave float32 instead of float64"),
    "GivesSwappedBytes": ("test_dequantize_shapes", "swapped byte order"),
    "IgnoresOrientation": ("test_dot_is_right_for_square_weights", "over the bound"),
    "TakesTheFirstOfTheStack": ("test_dot_shapes", "over the bound"),
    "HidesWhatIsNotFinite": ("test_dot_of_what_is_not_finite", "where the float product is"),
    "GivesNaNForInfinity": ("test_dot_of_what_is_not_finite", "where the float product is"),
    "OverwritesX": ("test_dot_leaves_its_operands_alone", "x: "),
    "ReadsMemoryAsItLies": ("test_dot_memory_forms", "packed byte-swapped"),
    "SharesABuffer": ("test_dot_in_threads", "in a thread"),
    "ClipsIndices": ("test_take_out_of_range", "neither IndexError nor NaN"),
    "RefusesEverything": ("test_something_is_supported", "for every scheme: it is Sunday"),
    "RefusesWithoutReason": ("test_dequantize_matches_the_rule", "True or the reason why not"),
    "RaisesInSupports": ("test_dot_shapes", "supports() raised"),
    "PromisesTooMuch": ("test_dot_shapes", "where supports says True"),
    "LosesARowInItsLayout": ("test_prepack", "after canonical()"),
    "RoundsHalvesTowardsZero": ("test_microscaled_quantize", "packed codes (mxfp4)"),
    "ReadsNaNAsANumber": ("test_microscaled_dequantize", "became a number"),
    "SwapsNibbles": ("test_microscaled_dot", "over the bound"),
}
"""Backend: the test that must catch it, and what that says."""

FORGIVEN = {
    "DeclaredToRoundTiesAway": "test_quantize_matches_the_reference",
    "DeclaredToDequantizeWithTwoRoundings": "test_dequantize_matches_the_rule",
    "DeclaredToGiveNaNForInfinity": "test_dot_of_what_is_not_finite",
}
"""Backends whose deviation is declared, and the test that lets it pass."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in an empty folder, without this project's configuration."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(FOLDER), "COLUMNS": "160"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=500)


Outcomes = dict[tuple[str, str], list[str]]
"""By backend and test: of each case, what its failure said, "skipped", or nothing where it passed."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What the kit says of every backend, in one process."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_it.py").write_text(SUITE)
    wanted = [(name, test) for name, (test, _) in WRONG.items()] + list(FORGIVEN.items())
    tests = [f"test_it.py::Test{name}::{test}" for name, test in wanted]
    tests += [f"test_it.py::TestReference::{test}" for test in sorted({test for _, test in wanted})]
    done = run(folder, "--junitxml=report.xml", "--tb=line", *tests)
    assert (folder / "report.xml").exists(), done.stdout + done.stderr
    found: Outcomes = {}
    for case in ET.parse(folder / "report.xml").iter("testcase"):
        backend, test = case.attrib["classname"].rpartition(".Test")[2], case.attrib["name"].partition("[")[0]
        found.setdefault((backend, test), []).append(_said(case))
    return found


def _said(case: ET.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    problems = [child for child in case if child.tag in ("failure", "error")]
    return " ".join(f"{child.attrib['message']} {child.text}" for child in problems)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_caught(outcomes: Outcomes, name: str) -> None:
    test, message = WRONG[name]
    failures = [said for said in outcomes[name, test] if said not in ("", "skipped")]
    assert failures, f"{test} passes"
    assert any(message in said for said in failures), failures[0]


@pytest.mark.parametrize("name", FORGIVEN)
def test_a_declared_deviation_is_forgiven(outcomes: Outcomes, name: str) -> None:
    assert set(outcomes[name, FORGIVEN[name]]) == {""}


@pytest.mark.parametrize("test", sorted({test for test, _ in WRONG.values()}))
def test_a_right_backend_passes(outcomes: Outcomes, test: str) -> None:
    said = outcomes["Reference", test]
    assert set(said) == {"skipped" if test == "test_prepack" else ""}, said


def test_every_backend_here_is_judged() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("defective_here", FOLDER / "defective.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {*WRONG, *FORGIVEN, "Reference"} == set(module.BACKENDS)


# --- the plugin -----------------------------------------------------------------------------------------------

KIT = ("-p", "quantcore.testing.plugin", "--pyargs", "quantcore.testing.conformance")


def test_the_kit_without_a_backend_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path, *KIT)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--quantcore-backend NAME" in done.stdout + done.stderr


def test_the_kit_without_its_plugin_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path, "--pyargs", "quantcore.testing.conformance")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--quantcore-backend NAME" in done.stdout + done.stderr


def test_an_unknown_backend_fails(tmp_path: Path) -> None:
    done = run(tmp_path, *KIT, "--quantcore-backend", "no such backend", "-k", "test_dequantize_stacks")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no backend is named 'no such backend'" in done.stdout
    assert "passed" not in done.stdout


def test_a_subclass_without_a_backend_fails(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from quantcore.testing import BackendConformance\nclass TestIt(BackendConformance): pass\n"
    )
    done = run(tmp_path, "-k", "test_dequantize_stacks")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "TestIt names no backend" in done.stdout


def test_the_summary_says_what_ran_what_was_refused_and_the_worst_errors(tmp_path: Path) -> None:
    done = run(tmp_path, *KIT, "--quantcore-backend", "mlx", "-k", "test_dot_precision or test_take_axes", "-rs")
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    summary = done.stdout.partition("quantcore conformance =")[2]
    assert "backend mlx on mlx arrays" in summary
    assert "precision default  worst NMSE of a row" in summary
    assert "dot refused" in summary
    assert "mlx refuses take: MLX's kernels take groups of 32, 64, 128, not 16" in done.stdout


def test_an_op_that_is_refused_every_time_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    chosen = "test_it.py::TestRefusesEverything::test_dot_shapes", "test_it.py::TestReference::test_take_axes"
    done = run(tmp_path, "-p", "quantcore.testing.plugin", *chosen)
    assert "failed" not in done.stdout.splitlines()[-1]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "refused every call of dot: it is Sunday" in done.stdout


def test_a_universal_backend_is_tested_on_the_library_that_is_named(tmp_path: Path) -> None:
    options = ("--quantcore-backend", "array_api", "-k", "test_dot_out_dtype")
    default = run(tmp_path, *KIT, *options)
    assert "backend array_api on array_api_strict arrays" in default.stdout
    assert "array_api_strict has no bfloat16" in default.stdout
    assert default.returncode == pytest.ExitCode.OK
    named = run(tmp_path, *KIT, *options, "--quantcore-library", "numpy")
    assert "backend array_api on numpy arrays" in named.stdout
    assert "not applicable" not in named.stdout
    assert named.returncode == pytest.ExitCode.OK
