"""quantcore.torch and quantcore.jax: opened at the first attribute, through an entry point."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import quantcore as qc
from quantcore import doors, registry


class Entry:
    def __init__(self, name: str, load: Any) -> None:
        self.name = name
        self.load = load


def lead_to(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    installed = registry.entry_points
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda *, group: entries if group == doors.ENTRY_POINT_GROUP else installed(group=group),
    )


@pytest.mark.parametrize("name", doors.DOORS)
def test_a_door_shows_the_public_names_behind_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, Entry(name, lambda: SimpleNamespace(__all__=["place", "Layer"], place=1, Layer=2, _hidden=3)))
    module = importlib.import_module(f"quantcore.{name}")
    assert getattr(qc, name) is module
    assert (module.place, module.Layer, dir(module)) == (1, 2, ["Layer", "place"])
    with pytest.raises(AttributeError, match=rf"quantcore\.{name}.*'_hidden'.*Layer, place"):
        module._hidden  # noqa: B018


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ImportError("No module named 'torch'")

    lead_to(monkeypatch, Entry("torch", fail))
    with pytest.raises(qc.BackendUnavailableError, match=r"No module named 'torch'.*quantcore-arrays\[torch\]"):
        qc.torch.QuantizedLinear  # noqa: B018
    with pytest.raises(qc.BackendUnavailableError, match=r"quantcore\.jax"):
        qc.jax.shard  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'cupy'"):
        qc.cupy  # noqa: B018


def test_a_door_that_nobody_opened_imports_nothing() -> None:
    script = (
        "import sys, quantcore.torch, quantcore.jax, quantcore as qc; qc.torch; qc.jax\n"
        "print([n for n in sys.modules if n.partition('.')[0] in ('torch', 'jax', 'quantcore_backends')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
