"""Which tests of the kit are left to ``pytest -m slow``."""

import pytest

KEPT = {
    "TestTorchCompiled": 23,  # compiling each call takes a fifth of a second
    "TestTorchTiles": 5,
    "TestArrayAPIOnNumPy": 5,  # the same code runs in full on array_api_strict
    "TestArrayAPIOnMLX": 5,
    "TestArrayAPIOnTorch": 5,
}
"""Of the tests of a class, which one in how many isn't slow: no divisor of how many dtypes, bits or forms there are."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but a fixed sample of some classes slow."""
    seen = dict.fromkeys(KEPT, 0)
    for item in items:
        name = getattr(getattr(item, "cls", None), "__name__", "")
        if name in seen:
            if seen[name] % KEPT[name]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
