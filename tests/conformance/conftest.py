"""Which tests of the kit are left to ``pytest -m slow``: compiling each call takes a fifth of a second."""

import pytest

KEPT = 24


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the compiled kit slow, but for every 24th of its tests."""
    compiled = [item for item in items if "Compiled" in getattr(getattr(item, "cls", None), "__name__", "")]
    for place, item in enumerate(compiled):
        if place % KEPT:
            item.add_marker(pytest.mark.slow)
