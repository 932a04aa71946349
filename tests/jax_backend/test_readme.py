"""The README's section on JAX runs as it stands."""

import re
from pathlib import Path
from typing import Any

import numpy as np

README = Path(__file__).parents[2] / "README.md"


def test_the_screen_of_use_runs() -> None:
    (section,) = re.findall(r"^## JAX\n(.*?)^## ", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["ys"].shape == (8, 2, 512)
    assert names["g"].shape == names["h"].shape == names["y"].shape == (2, 512)
    np.testing.assert_allclose(names["y"], names["ys"][0], rtol=1e-4, atol=1e-3)
