"""README.md says nothing that doesn't run: its screen of use is executed, and its commands exist."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
PROJECT = README.with_name("pyproject.toml")


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_screen_of_use_gives_the_shapes_it_claims(namespace: dict[str, Any]) -> None:
    assert namespace["y"].shape == (1, 8, 512)
    assert namespace["ym"].shape == (1, 8, 512)
    assert namespace["rows"].shape == (2, 2, 384)
    qw = namespace["qw"]
    result = namespace["mlp"](namespace["x"], qw.mT, namespace["qc"].quantize(namespace["w"], bits=8))
    assert result.shape == (1, 8, 4096)


def test_repr_in_the_comment_is_the_real_one(namespace: dict[str, Any]) -> None:
    assert f"# {namespace['qw']!r}" in README.read_text(encoding="utf-8")


def test_products_agree_across_the_ways_to_write_them(namespace: dict[str, Any]) -> None:
    np, qc = namespace["np"], namespace["qc"]
    x, qw = namespace["x"], namespace["qw"]
    expected = qc.dot(x, qw)
    np.testing.assert_array_equal(x @ qw.mT, expected)
    np.testing.assert_array_equal(qc.dot(x, qw, axes=([2], [1])), expected)
    np.testing.assert_allclose(np.asarray(namespace["ym"]), expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(
        np.asarray(namespace["f"](namespace["mx"].array(x))),
        np.asarray(qc.dot(namespace["mx"].array(x), namespace["qm"])),
    )


def test_extras_in_the_commands_exist() -> None:
    import tomllib

    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        name
        for group in re.findall(r'"\.\[([a-z,]+)\]"', README.read_text(encoding="utf-8"))
        for name in group.split(",")
    }
    assert named
    assert named <= set(extras)
